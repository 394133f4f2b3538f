"""Targets that values are fitted to where a rollout's final reward alone is not the target.

One convention for both. The prefixes of a rollout are s_0 (the bare prompt) .. s_H (the complete
answer), and a mask says where they lie: true at s_0..s_H, which stand side by side, false at
padding, on either side of them:

    mask     F    F    T    T    T    T    F
                       s_0  s_1  s_2  s_3           H = 3
    reward                       r                  of the step s_2 -> s_3, the only one

The step into the complete answer carries the reward r, undiscounted, and nothing follows it:
V(s_H) is never bootstrapped from, since r is known there. The search scores complete answers
too, so s_H has a target as well: r. Where a rollout is its prompt alone (H = 0), that is all.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def last_prefix(mask: Bool[Array, "*batch length"]) -> Bool[Array, "*batch length"]:
    """Where each row has its complete answer: at its last true position."""
    following = lax.cumsum(mask.astype(jnp.int32), axis=mask.ndim - 1, reverse=True)
    return mask & (following == 1)


def td_lambda_targets(
    values: Float[Array, "batch length"],
    rewards: Float[Array, " batch"],
    mask: Bool[Array, "batch length"],
    gamma: float = 1.0,
    lam: float = 0.99,
) -> Float[Array, "batch length"]:
    """TD(lambda) targets (equation 50): lambda-returns, from the last prefix backwards.

        G_H = G_{H-1} = r
        G_h = gamma * ((1 - lam) * V(s_{h+1}) + lam * G_{h+1})    for h < H - 1

    lam = 0 is one-step TD; lam = gamma = 1 is Monte Carlo, r everywhere.

    >>> values = jnp.array([[0.5, 0.2, 0.4, 0.9]])
    >>> mask = jnp.ones((1, 4), bool)
    >>> print(td_lambda_targets(values, jnp.ones(1), mask, lam=0.0))
    [[0.2 0.4 1.  1. ]]

    Args:
      values: V of every prefix, under the parameters that give the targets.
      rewards: r of every rollout.
      mask: which positions are prefixes; see the module.
      gamma: discount of a step.
      lam: lambda; the paper's is .99.

    Returns:
      The targets; zero at padding.

    Raises:
      ValueError: shapes do not fit, or `gamma` or `lam` is outside [0, 1].

    Reference: Sutton and Barto, Reinforcement Learning, second edition, section 12.1.
    """
    values, rewards = _checked(values, rewards, mask, gamma, lam)
    known = _known(mask)
    bootstrapped = gamma * (1 - lam) * _next(values)
    terms = jnp.where(known, rewards, bootstrapped)
    targets = _accumulate(terms, jnp.where(known, 0, gamma * lam))
    return jnp.where(mask, targets, 0)


def gae_targets(
    values: Float[Array, "batch length"],
    rewards: Float[Array, " batch"],
    mask: Bool[Array, "batch length"],
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Float[Array, "batch length"]:
    """Targets A_h + V(s_h) from generalised advantage estimates.

        delta_h = gamma * V(s_{h+1}) - V(s_h)    for h < H - 1
        A_h     = delta_h + gamma * lam * A_{h+1}
        A_h     = r - V(s_h)                     for h = H - 1 and h = H

    In exact arithmetic they are `td_lambda_targets` of the same gamma and lam: the sum of
    discounted TD errors telescopes. Both are here because the paper's grid names both.

    Args:
      values: V of every prefix, under the parameters that give the targets.
      rewards: r of every rollout.
      mask: which positions are prefixes; see the module.
      gamma: discount of a step; the paper's grid: 1, .99, .98, .97, .95.
      lam: lambda; the paper's is 1.

    Returns:
      The targets; zero at padding.

    Raises:
      ValueError: shapes do not fit, or `gamma` or `lam` is outside [0, 1].

    Reference: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage
    Estimation, arXiv 1506.02438.
    """
    values, rewards = _checked(values, rewards, mask, gamma, lam)
    known = _known(mask)
    errors = jnp.where(known, rewards, gamma * _next(values)) - values
    advantages = _accumulate(errors, jnp.where(known, 0, gamma * lam))
    return jnp.where(mask, advantages + values, 0)


def _checked(
    values: Array, rewards: Array, mask: Array, gamma: float, lam: float
) -> tuple[Array, Array]:
    """Values in f32 or more that are zero at padding, and rewards as a column."""
    if values.ndim != 2 or mask.shape != values.shape or rewards.shape != values.shape[:1]:
        raise ValueError(
            "values and mask must be [batch, length] and rewards [batch]."
            f" Got: {values.shape}, {mask.shape} and {rewards.shape}"
        )
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gamma and lam must be in [0, 1]. Got: {gamma} and {lam}")
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.where(mask, values, 0).astype(dtype), rewards.astype(dtype)[:, None]


def _known(mask: Array) -> Array:
    """Where the target is the reward: the complete answer, and the prefix before it."""
    last = last_prefix(mask)
    return mask & (last | _next(last))


def _next(x: Array) -> Array:
    """What stands at the next position; nothing after the last."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _accumulate(terms: Array, decays: Array) -> Array:
    """x_h = terms_h + decays_h * x_{h+1}, from the right."""
    first = jnp.zeros_like(terms[:, 0])
    return lax.scan(_step, first, (terms.T, decays.T), reverse=True)[1].T


def _step(following: Array, columns: tuple[Array, Array]) -> tuple[Array, Array]:
    term, decay = columns
    here = term + decay * following
    return here, here
