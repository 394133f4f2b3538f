"""Losses of value functions: pure functions, one idea each.

    monte_carlo_loss    the final reward at every prefix (FUDGE)
    verifiable_loss     the same for rewards in {0, 1}: binary cross-entropy
    categorical_loss    the same for a distribution of the reward: cross-entropy
    td_loss             targets of `iro_jax.values.targets`
    cdq_loss            the policy's own expectation of the next value
    compression_loss    what several value functions say together

Letters: `batch` rollouts, `length` positions, A atoms. A rollout's prefixes reach from the bare
prompt to the complete answer; `mask` is true at them and false at padding, on either side. Every
loss is the mean over rollouts of the **sum** over prefixes, as in equation (7): a long answer
weighs more than a short one. With `weights`, `[batch]`, the mean is weighted (divided by their
sum; zero if that is zero), and rollouts of weight zero are filler.

What stands at padding or in filler, NaN included, touches neither the loss nor its gradient. The
sums are in f32, or in f64 where values are. A ValueError says which shapes do not fit.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from iro_jax.values.targets import last_prefix


def monte_carlo_loss(
    values: Float[Array, "batch length"],
    rewards: Float[Array, " batch"],
    mask: Bool[Array, "batch length"],
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Regression on the final reward: mean over rollouts of sum_h (V(s_h) - r)^2, equation (7).

    >>> values = jnp.array([[1.0, 3.0], [0.0, jnp.nan]])
    >>> mask = jnp.array([[True, True], [True, False]])
    >>> print(monte_carlo_loss(values, jnp.array([1.0, 2.0]), mask))
    4.0

    Args:
      values: V of every prefix.
      rewards: r of every rollout.
      mask: which positions are prefixes.
      weights: of the rollouts; one each by default.

    Reference: Yang and Klein, FUDGE, arXiv 2104.05218, with a squared error.
    """
    return _squared_loss(values, _per_prefix(rewards, mask), mask, weights)


def verifiable_loss(
    logits: Float[Array, "batch length"],
    rewards: Float[Array, " batch"],
    mask: Bool[Array, "batch length"],
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Binary cross-entropy with a verifiable reward, equation (49), for V = sigmoid(logit).

    Mean over rollouts of -sum_h (r log V(s_h) + (1 - r) log(1 - V(s_h))), from the logits: it
    stays exact where the sigmoid is 0 or 1 in f32.

    >>> loss = verifiable_loss(jnp.array([[200.0]]), jnp.array([0.0]), jnp.array([[True]]))
    >>> print(loss)
    200.0

    Args:
      logits: of every prefix, `Head.logits`.
      rewards: r of every rollout, in [0, 1].
      mask: which positions are prefixes.
      weights: of the rollouts; one each by default.
    """
    kept = _kept(logits, mask, weights)
    logits, rewards = _clean(logits, kept), _clean(_per_prefix(rewards, mask), kept)
    losses = optax.losses.sigmoid_binary_cross_entropy(logits, rewards)
    return _mean_of_sums(losses, kept, weights)


def categorical_loss(
    logits: Float[Array, "batch length A"],
    rewards: Float[Array, " batch"],
    mask: Bool[Array, "batch length"],
    support: tuple[float, float],
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Cross-entropy of the distribution of the final reward with the reward that came.

    Mean over rollouts of -sum_h sum_j q_j log softmax(logits(s_h))_j with q = `two_hot` of r.

    >>> logits = jnp.zeros((1, 1, 11))
    >>> loss = categorical_loss(logits, jnp.array([0.3]), jnp.array([[True]]), (0.0, 1.0))
    >>> print(loss.round(3))  # log 11
    2.398

    Args:
      logits: of every prefix, `Head.logits`.
      rewards: r of every rollout; taken for the nearest end where it is outside the support.
      mask: which positions are prefixes.
      support: the lowest and the highest atom, `Head.support`.
      weights: of the rollouts; one each by default.

    Reference: Zhou et al., Q#, arXiv 2502.20548; Bellemare et al., A Distributional Perspective
    on Reinforcement Learning, arXiv 1707.06887, for the projection.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits must be [batch, length, atoms]. Got: {logits.shape}")
    kept = _kept(logits[..., 0], mask, weights)
    logits = _clean(logits, kept[..., None])
    rewards = _clean(_per_prefix(rewards, mask), kept)
    losses = optax.losses.softmax_cross_entropy(logits, two_hot(rewards, support, logits.shape[-1]))
    return _mean_of_sums(losses, kept, weights)


def td_loss(
    values: Float[Array, "batch length"],
    targets: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Mean over rollouts of sum_h (sg[target_h] - V(s_h))^2, equation (50).

    Args:
      values: V of every prefix.
      targets: `td_lambda_targets` or `gae_targets`; no gradient flows through them.
      mask: which positions are prefixes.
      weights: of the rollouts; one each by default.
    """
    return _squared_loss(values, targets, mask, weights)


def cdq_loss(
    values: Float[Array, "batch length"],
    expected_next: Float[Array, "batch length"],
    rewards: Float[Array, " batch"],
    mask: Bool[Array, "batch length"],
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Controlled decoding's loss: mean over rollouts of sum_h (V(s_h) - sg[v_h])^2 / 2.

        v_h = sum_z pi(z | s_h) V([s_h, z])    before the complete answer
        v_H = r                                at the complete answer

    Args:
      values: V of every prefix.
      expected_next: the sum over next tokens z; what it says at the complete answer is not used
        and may be NaN. No gradient flows through it.
      rewards: r of every rollout.
      mask: which positions are prefixes.
      weights: of the rollouts; one each by default.

    Reference: Mudgal et al., Controlled Decoding from Language Models, arXiv 2310.17022 (CD-Q).
    """
    if expected_next.shape != mask.shape:
        raise ValueError(f"expected_next must be {mask.shape}. Got: {expected_next.shape}")
    targets = jnp.where(last_prefix(mask), _per_prefix(rewards, mask), expected_next)
    return _squared_loss(values, targets, mask, weights) / 2


def compression_loss(
    values: Float[Array, "batch length"],
    targets: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Mean over rollouts of sum_h (sum_t V_t(s_h) / beta_t - V_m(s_h))^2, equation (10).

    Args:
      values: V_m of every prefix.
      targets: sum_t V_t / beta_t of every prefix; no gradient flows through it.
      mask: which positions are prefixes.
      weights: of the rollouts; one each by default.
    """
    return _squared_loss(values, targets, mask, weights)


def two_hot(
    rewards: Float[Array, "*batch"], support: tuple[float, float], num_atoms: int
) -> Float[Array, "*batch A"]:
    """The weights on evenly spaced atoms, on two neighbours at most, whose mean is the reward.

    >>> print(two_hot(jnp.array([0.125, 7.0]), (0.0, 1.0), 3))
    [[0.75 0.25 0.  ]
     [0.   0.   1.  ]]

    Args:
      rewards: taken for the nearest end where they are outside the support.
      support: the lowest and the highest atom.
      num_atoms: A, at least 2.

    Raises:
      ValueError: there is no such support.
    """
    low, high = support
    if not low < high or num_atoms < 2:
        raise ValueError(f"Atoms need low < high and number 2. Got: {support}, {num_atoms} atoms")
    place = (jnp.clip(rewards, low, high) - low) * ((num_atoms - 1) / (high - low))
    return jnp.maximum(0, 1 - jnp.abs(place[..., None] - jnp.arange(num_atoms)))


def _squared_loss(
    values: Array, targets: Array, mask: Array, weights: Array | None
) -> Float[Array, ""]:
    kept = _kept(values, mask, weights)
    if targets.shape != mask.shape:
        raise ValueError(f"targets must be {mask.shape}, as the mask. Got: {targets.shape}")
    errors = _clean(values, kept) - lax.stop_gradient(_clean(targets, kept))
    return _mean_of_sums(jnp.square(errors), kept, weights)


def _kept(values: Array, mask: Array, weights: Array | None) -> Bool[Array, "batch length"]:
    """The prefixes that count: neither padding nor filler."""
    if mask.ndim != 2 or values.shape != mask.shape:
        raise ValueError(
            "mask must be [batch, length], and values or logits likewise."
            f" Got: {mask.shape} and {values.shape}"
        )
    if weights is None:
        return mask
    if weights.shape != mask.shape[:1]:
        raise ValueError(f"weights must be {mask.shape[:1]}. Got: {weights.shape}")
    return mask & (weights != 0)[:, None]


def _per_prefix(rewards: Array, mask: Array) -> Float[Array, "batch length"]:
    if rewards.shape != mask.shape[:1]:
        raise ValueError(f"rewards must be {mask.shape[:1]}. Got: {rewards.shape}")
    return jnp.broadcast_to(rewards[:, None], mask.shape)


def _clean(x: Array, kept: Array) -> Array:
    """Zero where nothing counts, before anything is computed from it.

    To mask the loss alone is not enough: the gradient of a NaN that is masked afterwards is NaN.
    """
    return jnp.where(kept, x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean_of_sums(losses: Array, kept: Array, weights: Array | None) -> Float[Array, ""]:
    sums = jnp.sum(jnp.where(kept, losses, 0), axis=1)
    if weights is None:
        return jnp.mean(sums)
    total = jnp.sum(weights)
    return jnp.sum(sums * weights) / jnp.where(total == 0, 1, total)
