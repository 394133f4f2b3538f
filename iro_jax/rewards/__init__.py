"""What scores a whole answer: reward models, verifiers, lexicons, constraints, endpoints."""

from iro_jax.rewards.cache import CachedReward, answer_key
from iro_jax.rewards.classifier import ClassifierReward
from iro_jax.rewards.constraints import KINDS, Constraint, ConstraintReward, check, describe
from iro_jax.rewards.endpoint import EndpointReward, RewardEndpointError
from iro_jax.rewards.function import CallableReward
from iro_jax.rewards.lexicons import LexiconReward, VaderReward
from iro_jax.rewards.model import ModelReward
from iro_jax.rewards.notation import normalise_answer
from iro_jax.rewards.process import ProcessReward
from iro_jax.rewards.token_scores import ScoreFn, TokenScores
from iro_jax.rewards.types import Answer, Reward, TextAnswer, check_rewards
from iro_jax.rewards.verifiers import (
    ExactMatch,
    Extract,
    boxed_answer,
    gsm8k_answer,
    last_number,
    worked_answer,
)

__all__ = [
    "KINDS",
    "Answer",
    "CachedReward",
    "CallableReward",
    "ClassifierReward",
    "Constraint",
    "ConstraintReward",
    "EndpointReward",
    "ExactMatch",
    "Extract",
    "LexiconReward",
    "ModelReward",
    "ProcessReward",
    "Reward",
    "RewardEndpointError",
    "ScoreFn",
    "TextAnswer",
    "TokenScores",
    "VaderReward",
    "answer_key",
    "boxed_answer",
    "check",
    "check_rewards",
    "describe",
    "gsm8k_answer",
    "last_number",
    "normalise_answer",
    "worked_answer",
]
