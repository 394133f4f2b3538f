"""Training-time rivals, where weights may be touched: reward models, DPO, GRPO, iREPO."""

from iro_jax.baselines.losses import (
    bradley_terry_loss,
    dpo_loss,
    group_advantages,
    grpo_loss,
    irepo_loss,
    soft_preference,
    strengths,
)
from iro_jax.baselines.online import OnlineSettings, Round, TunedOnline, tune_grpo, tune_irepo
from iro_jax.baselines.pairs import Pair, TunedReward, tune_dpo, tune_reward
from iro_jax.baselines.policies import Tuned, TuningSettings, token_log_probs, tune

__all__ = [
    "OnlineSettings",
    "Pair",
    "Round",
    "Tuned",
    "TunedOnline",
    "TunedReward",
    "TuningSettings",
    "bradley_terry_loss",
    "dpo_loss",
    "group_advantages",
    "grpo_loss",
    "irepo_loss",
    "soft_preference",
    "strengths",
    "token_log_probs",
    "tune",
    "tune_dpo",
    "tune_grpo",
    "tune_irepo",
    "tune_reward",
]
