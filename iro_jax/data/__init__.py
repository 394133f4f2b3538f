"""Prompts in, rollouts out: reading prompts, storing rollouts, choosing what values train on."""

from iro_jax.data.dataset import batches, choose, num_batches, split_by_prompt
from iro_jax.data.prompts import Prompt, read_prompts, subset, write_prompts
from iro_jax.data.rollouts import Rollout
from iro_jax.data.sources import MissingSourceError, PromptError
from iro_jax.data.store import RolloutError, RolloutStore, Shard

__all__ = [
    "MissingSourceError",
    "Prompt",
    "PromptError",
    "Rollout",
    "RolloutError",
    "RolloutStore",
    "Shard",
    "batches",
    "choose",
    "num_batches",
    "read_prompts",
    "split_by_prompt",
    "subset",
    "write_prompts",
]
