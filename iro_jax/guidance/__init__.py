"""Searches of real models: policies, scorers, tokenizer bridges, and text in and out."""

from iro_jax.guidance.answers import AnswerSource, Guided, GuidedAnswer, Reward
from iro_jax.guidance.api import ApiGuide, api_value_scorer
from iro_jax.guidance.api_sampler import ApiSampler
from iro_jax.guidance.bridge import Boundaries, Bridge, BridgedValues
from iro_jax.guidance.endpoint import ApiError, Endpoint
from iro_jax.guidance.functions import function_scorer, reads_policy, shared_passes, watching
from iro_jax.guidance.guide import Guide, value_scorer
from iro_jax.guidance.guided import GuidedSearch
from iro_jax.guidance.params import GuidedParams
from iro_jax.guidance.policy import PolicyMemory, PolicySampler, Segments, TopTokens
from iro_jax.guidance.scorers import (
    LogRatio,
    LogRatioParams,
    NoScore,
    PolicyHeads,
    PolicyHeadsParams,
    Scorer,
    Sizes,
    ValueSum,
    ValueSumParams,
    Watching,
    WatchingParams,
)
from iro_jax.guidance.trees import TreeNode, tree_nodes

__all__ = [
    "AnswerSource",
    "ApiError",
    "ApiGuide",
    "ApiSampler",
    "Boundaries",
    "Bridge",
    "BridgedValues",
    "Endpoint",
    "Guide",
    "Guided",
    "GuidedAnswer",
    "GuidedParams",
    "GuidedSearch",
    "LogRatio",
    "LogRatioParams",
    "NoScore",
    "PolicyHeads",
    "PolicyHeadsParams",
    "PolicyMemory",
    "PolicySampler",
    "Reward",
    "Scorer",
    "Segments",
    "Sizes",
    "TopTokens",
    "TreeNode",
    "ValueSum",
    "ValueSumParams",
    "Watching",
    "WatchingParams",
    "api_value_scorer",
    "function_scorer",
    "reads_policy",
    "shared_passes",
    "tree_nodes",
    "value_scorer",
    "watching",
]
