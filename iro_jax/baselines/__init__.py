"""Training-time rivals, where weights may be touched: for now their losses."""

from iro_jax.baselines.losses import (
    bradley_terry_loss,
    dpo_loss,
    group_advantages,
    grpo_loss,
    irepo_loss,
    soft_preference,
    strengths,
)

__all__ = [
    "bradley_terry_loss",
    "dpo_loss",
    "group_advantages",
    "grpo_loss",
    "irepo_loss",
    "soft_preference",
    "strengths",
]
