"""The final choice among a search's finalists.

`search` itself picks by value. `choose` takes any other scores of the finalists, such as
rewards; `majority` lets answers vote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iro_jax.search.tree import ranking
from iro_jax.search.types import SearchOutput


def choose(output: SearchOutput, rewards: Float[Array, "P M"]) -> SearchOutput:
    """Ranks the finalists by `rewards` (ties towards the lower index) and picks the first.

    Raises:
      ValueError: a reward of a finalist is NaN (outside `jax.jit`, where that is known).
    """
    valid = output.finalists.valid
    rewards = jnp.asarray(rewards, jnp.float32)
    missing = valid & jnp.isnan(rewards)
    if not isinstance(missing, jax.core.Tracer) and bool(missing.any()):
        bad = [int(index) for index in jnp.flatnonzero(missing.any(axis=-1))]
        raise ValueError(f"The rewards of finalists must be numbers. Got: NaN in prompts {bad}")
    order = ranking(rewards, valid)
    return dataclasses.replace(output, ranking=order, best=order[:, 0])


def majority(votes: Sequence[Hashable | None], weights: Sequence[float] | None = None) -> list[int]:
    """Ranks answers by how many agree with them.

    Args:
      votes: what each answer says, in the order of the answers; None says nothing.
      weights: what each vote counts; 1 by default.

    Returns:
      Indices: by falling count of the vote, ties to the vote seen first, and within a vote
      by index. Answers that say nothing come last.
    """
    weights = [1.0] * len(votes) if weights is None else weights
    counts: dict[Hashable, float] = {}
    for vote, weight in zip(votes, weights, strict=True):
        if vote is not None:
            counts[vote] = counts.get(vote, 0.0) + weight
    standing = {vote: place for place, vote in enumerate(sorted(counts, key=lambda v: -counts[v]))}
    last = len(standing)

    def place(index: int) -> int:
        vote = votes[index]
        return last if vote is None else standing[vote]

    return sorted(range(len(votes)), key=place)
