"""Rejection sampling of chunks: a selection that takes the first proposal it accepts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from iro_jax.search.types import Candidates


@dataclasses.dataclass(frozen=True)
class AcceptFirst:
    """Cascade reward sampling (CARDS, arXiv 2406.16306): a `SelectFn`.

    A row's B successors are proposals, looked at in turn. One of reward r that makes the answer t
    tokens long is accepted with probability min(1, exp((r - tau(t)) / beta)), where

        tau(t) = min(r*, r_0 + t (r* - r_0) / T_max),   r_0 = (1 - alpha) r(x) + alpha r*

    rises from near the bare prompt's reward r(x) to the goal. If none is accepted, the best is
    taken.

    All B proposals are made at once, so that tokens are those of all of them; what is taken has the
    distribution of a program that stops at the first accepted one.

    Attributes:
      goal: r*, a reward that answers should reach.
      horizon: T_max, the length at which the threshold reaches the goal.
      alpha: how far the first threshold is on its way from r(x) to the goal.
      beta: temperature of the acceptance.
    """

    goal: float
    horizon: int
    alpha: float = 0.5
    beta: float = 0.7

    def __post_init__(self):
        if self.horizon < 1 or not self.beta > 0:
            raise ValueError(
                "horizon must be at least 1 and beta positive."
                f" Got: horizon={self.horizon}, beta={self.beta}"
            )

    def __call__(
        self, keys: Key[Array, " P"], scores: Float[Array, "P U"], candidates: Candidates
    ) -> Int[Array, "P K"]:
        _, width, successors = candidates.valid.shape
        of_rows = scores.reshape(candidates.valid.shape)
        log_odds = (of_rows - self.thresholds(candidates)) / self.beta
        uniform = jax.vmap(lambda key: jax.random.uniform(key, scores.shape[1:]))(keys)
        accepted = jnp.log(uniform).reshape(of_rows.shape) < log_odds
        # A finished beam is carried, not proposed.
        accepted = candidates.valid & (accepted | ~candidates.new)
        best = jnp.argmax(jnp.where(candidates.valid, of_rows, -jnp.inf), axis=-1)
        first = jnp.argmax(accepted, axis=-1)
        chosen = jnp.where(jnp.any(accepted, axis=-1), first, best)
        return jnp.arange(width) * successors + chosen

    def thresholds(self, candidates: Candidates) -> Float[Array, "P K B"]:
        """tau of every candidate."""
        of_prompt = candidates.prompt_scores[:, None, None]
        start = (1 - self.alpha) * of_prompt + self.alpha * self.goal
        risen = start + candidates.lengths / self.horizon * (self.goal - start)
        return jnp.minimum(risen, self.goal)
