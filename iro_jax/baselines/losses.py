"""Losses of methods that touch weights: pure functions, one idea each.

    bradley_terry_loss   reward models, from pairs
    dpo_loss             policies, from pairs: the reward is a log-ratio
    grpo_loss            policies, from groups of their own answers with rewards
    irepo_loss           policies, from pairs of their own answers with soft labels
    strengths            soft labels: Zermelo's iteration over who beat whom

Log-probabilities of answers are sums over their tokens, EOS included. Every loss is a mean over
pairs or answers; with `weights`, `[n]`, it is weighted, and what weighs nothing is filler.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpy.typing import ArrayLike


def bradley_terry_loss(
    chosen: Float[Array, " n"],
    rejected: Float[Array, " n"],
    margin: Float[Array, " n"] | float = 0.0,
    weights: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """-log sigmoid(r(y+) - r(y-) - margin).

    >>> print(bradley_terry_loss(jnp.array([1.0]), jnp.array([1.0])).round(4))  # log 2
    0.6931

    Args:
      chosen, rejected: rewards of the two answers.
      margin: by which the better answer should lead; zero by default.

    Reference: Bradley and Terry 1952; Touvron et al., Llama 2, arXiv 2307.09288, for the margin.
    """
    return _mean(-jax.nn.log_sigmoid(chosen - rejected - margin), weights)


def dpo_loss(
    chosen: Float[Array, " n"],
    rejected: Float[Array, " n"],
    reference_chosen: Float[Array, " n"],
    reference_rejected: Float[Array, " n"],
    beta: float = 0.1,
    weights: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """-log sigmoid(beta (log-ratio of y+ - log-ratio of y-)).

    Args:
      chosen, rejected: log-probabilities under the policy that is trained.
      reference_chosen, reference_rejected: under the one that it started from.

    Reference: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290.
    """
    gap = (chosen - reference_chosen) - (rejected - reference_rejected)
    return _mean(-jax.nn.log_sigmoid(beta * gap), weights)


def group_advantages(rewards: Float[ArrayLike, "groups size"]) -> Float[np.ndarray, "groups size"]:
    """A = (r - mean) / (std + 1e-4) within groups of answers to one prompt; std with size - 1.

    Raises:
      ValueError: groups of fewer than two.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, at least 2]. Got: {rewards.shape}")
    deviation = rewards.std(axis=1, ddof=1, keepdims=True)
    return (rewards - rewards.mean(axis=1, keepdims=True)) / (deviation + 1e-4)


def grpo_loss(
    log_probs: Float[Array, "n length"],
    sampled: Float[Array, "n length"],
    reference: Float[Array, "n length"],
    advantages: Float[Array, " n"],
    mask: Bool[Array, "n length"],
    clip: float = 0.2,
    beta: float = 0.04,
    weights: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """The clipped surrogate with a penalty: mean over answers of the mean over their tokens of

        -min(q A, clip(q, 1 - eps, 1 + eps) A) + beta (exp(d) - d - 1)

    with q = pi / pi_sampled and d = log pi_reference - log pi, whose last term (k3) estimates the
    divergence from the reference without bias.

    Args:
      log_probs: of the answers' tokens under the policy that is trained.
      sampled: under the policy that sampled them.
      reference: under the one that it started from.
      advantages: of the answers; see `group_advantages`.
      mask: which places are tokens of the answer.

    Reference: Shao et al., DeepSeekMath, arXiv 2402.03300.
    """
    log_probs, sampled, reference = (
        jnp.where(mask, x, 0.0) for x in (log_probs, sampled, reference)
    )
    ratio, gain = jnp.exp(log_probs - sampled), advantages[:, None]
    surrogate = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain)
    behind = reference - log_probs
    penalty = jnp.expm1(behind) - behind
    tokens = jnp.where(mask, beta * penalty - surrogate, 0.0)
    return _mean(tokens.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1), weights)


def irepo_loss(
    first: Float[Array, " n"],
    second: Float[Array, " n"],
    reference_first: Float[Array, " n"],
    reference_second: Float[Array, " n"],
    preference: Float[Array, " n"],
    beta: float = 0.1,
    weights: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """(beta (log-ratio of y1 - log-ratio of y2) - logit p)^2.

    Args:
      first, second: log-probabilities under the policy that is trained.
      reference_first, reference_second: under its previous iterate, which sampled the pair.
      preference: p, the probability that the first is better, inside (0, 1).

    Reference: Le et al., iREPO, arXiv 2405.15230. Reconstructed from its abstract and formulas as
    others report them: details may differ from the authors'.
    """
    gap = (first - reference_first) - (second - reference_second)
    return _mean(jnp.square(beta * gap - (jnp.log(preference) - jnp.log1p(-preference))), weights)


def strengths(
    wins: Float[ArrayLike, "items items"], *, iterations: int = 10_000, tolerance: float = 1e-10
) -> Float[np.ndarray, " items"]:
    """Strengths a of the Bradley-Terry model, where i beats j with probability a_i / (a_i + a_j).

    Zermelo's iteration a_i <- wins_i / sum_j n_ij / (a_i + a_j), normalised to a sum of one, with
    n_ij the times that i and j met.

    >>> print(strengths([[0, 3], [1, 0]]))
    [0.75 0.25]

    Args:
      wins: how often the row beat the column; fractions are half-hearted wins.

    Raises:
      ValueError: it is no square of numbers that are not negative, or an item never met another.

    Reference: Zermelo 1929.
    """
    wins = np.asarray(wins, np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not (wins >= 0).all():
        raise ValueError(f"wins must be a square of numbers from 0 on. Got: shape {wins.shape}")
    wins = wins * (1 - np.eye(len(wins)))
    met = wins + wins.T
    if not met.any(axis=1).all():
        alone = int(np.argmin(met.any(axis=1)))
        raise ValueError(f"Every item must have met another. Got: item {alone} that has not")
    found = np.full(len(wins), 1 / len(wins))
    for _ in range(iterations):
        sums = found[:, None] + found[None, :]
        shares = np.divide(met, sums, out=np.zeros_like(met), where=sums > 0)
        expected = shares.sum(axis=1)
        new = np.divide(wins.sum(axis=1), expected, out=np.zeros_like(found), where=expected > 0)
        new /= new.sum()
        if np.abs(new - found).max() < tolerance:
            return new
        found = new
    return found


def soft_preference(
    first: Float[ArrayLike, "annotators n"],
    second: Float[ArrayLike, "annotators n"],
    *,
    clip: float = 0.05,
) -> Float[np.ndarray, " n"]:
    """The probability that the first answers are better, from several annotators' scores.

    Of two answers, what Zermelo's iteration (`strengths`) ends in are their shares of the
    annotators that scored them higher; a tie is half a win for both.

    Args:
      clip: how near to 0 and 1 the result may come: a logit has to exist.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    share = ((a > b) + 0.5 * (a == b)).mean(axis=0)
    return np.clip(share, clip, 1 - clip)


def _mean(losses: Float[Array, " n"], weights: Float[Array, " n"] | None) -> Float[Array, ""]:
    if weights is None:
        return jnp.mean(losses)
    total = jnp.sum(weights)
    kept = jnp.where(weights != 0, losses, 0.0)
    return jnp.sum(kept * weights) / jnp.where(total == 0, 1, total)
