"""Drawing the next token: temperature, top-k, top-p, greedy.

Tokens are drawn by the Gumbel-max rule: the largest of `log p(v) + noise(v)` over the tokens
v that the warpers leave. Noise belongs to a key and a token id, not to a place in an array,
so a draw depends neither on how many tokens were left over, nor on batch, padding or
sharding. It is the noise of `jax.random.bits` under partitionable threefry.

Letters: V vocabulary size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

if TYPE_CHECKING:
    from kernels import Implementation

# Neighbours of which `top_k` first compares the largest only.
_GROUP = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Warpers apply in this order, as in `transformers`.

    Attributes:
      temperature: divides the logits; at least 1e-4, or 0 to take the most likely token.
      top_k: keeps the k most likely tokens (ties towards the lower id); None keeps all.
      top_p: then keeps the most likely tokens whose predecessors' mass is below top_p (ties
        towards the lower id).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-4 <= self.temperature < float("inf"):
            raise ValueError(
                "temperature must be 0 (greedy) or finite and at least 1e-4."
                f" Got: {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be None or at least 1. Got: {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]. Got: {self.top_p}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Drawn tokens and their log-probabilities, all of the batch's shape.

    Attributes:
      tokens: token ids.
      log_probs: under the policy itself, before the warpers (temperature 1).
      warped_log_probs: under the distribution that was drawn from; 0 when greedy.
    """

    tokens: Int[Array, "*batch"]
    log_probs: Float[Array, "*batch"]
    warped_log_probs: Float[Array, "*batch"]


def draw(
    keys: Key[Array, "*batch"],
    logits: Float[Array, "*batch V"],
    sampling: Sampling,
    noise: Float[Array, "*batch V"] | None = None,
    *,
    kernels: Implementation = "xla",
) -> Draw:
    """Draws one token per row.

    Args:
      keys: one threefry key per row.
      logits: of the policy.
      sampling: the warpers.
      noise: Gumbel noise to use instead of the keys' own.
      kernels: `xla`, or what draws in one pass over the logits where there is no `noise`; `auto`
        is `xla` on CPU.

    Returns:
      The draw. All log-probabilities are f32.
    """
    one_device = jax.sharding.get_abstract_mesh().size <= 1
    if kernels != "xla" and noise is None and one_device:
        fused = functools.partial(_fused, keys, logits, sampling, kernels)
        plain = functools.partial(draw, keys, logits, sampling)
        if kernels != "auto":
            return fused()
        return lax.platform_dependent(default=plain, tpu=fused, cuda=fused, rocm=fused)
    chex.assert_equal_shape_prefix([keys, logits], keys.ndim)
    chex.assert_rank(logits, keys.ndim + 1)
    if noise is not None:
        chex.assert_equal_shape([logits, noise])
    logits = logits.astype(jnp.float32)
    vocabulary = logits.shape[-1]

    def finish(tokens: Array, warped_log_probs: Array, largest: Array) -> Draw:
        drawn = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        normaliser = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
        return Draw(tokens.astype(jnp.int32), drawn - normaliser, warped_log_probs)

    if sampling.temperature == 0:
        tokens = _argmax(logits)
        largest = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return finish(tokens, jnp.zeros_like(largest), largest)

    kept, ids = warp(logits, sampling)
    if noise is None:
        chosen_noise = gumbel_noise(keys, ids)
    elif ids.shape[-1] == vocabulary:
        chosen_noise = noise
    else:
        chosen_noise = jnp.take_along_axis(noise, ids, axis=-1)
    best = _argmax(kept + chosen_noise)[..., None]
    tokens = jnp.take_along_axis(jnp.broadcast_to(ids, kept.shape), best, axis=-1)[..., 0]
    warped = jnp.take_along_axis(kept, best, axis=-1)[..., 0] - jax.nn.logsumexp(kept, axis=-1)
    return finish(tokens, warped, sampling.temperature * jnp.max(kept, axis=-1))


def _fused(keys: Array, logits: Array, sampling: Sampling, kernels: Implementation) -> Draw:
    from kernels import fused_draw  # Pallas takes a second to import

    rows = keys.size
    drawn = fused_draw(
        jax.random.key_data(keys).reshape(rows, -1),
        logits.astype(jnp.float32).reshape(rows, -1),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        implementation=kernels,
    )
    return Draw(*(x.reshape(keys.shape) for x in drawn))


def warp(
    logits: Float[Array, "*batch V"], sampling: Sampling
) -> tuple[Float[Array, "*batch kept"], Int[Array, "*batch kept"]]:
    """Warped logits, -inf where a token is ruled out, and the ids they belong to.

    With `top_k` these are the k most likely tokens in falling order; without it the whole
    vocabulary, its ids of shape `[1, ..., 1, V]`. Temperature 0 is not a distribution.
    """
    if sampling.temperature == 0:
        raise ValueError("Greedy decoding has no warped logits. Got: temperature=0")
    vocabulary = logits.shape[-1]
    scaled = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is None or sampling.top_k >= vocabulary:
        ids = jnp.arange(vocabulary).reshape((1,) * (logits.ndim - 1) + (-1,))
        if sampling.top_p < 1:
            scaled = _nucleus(scaled, sampling.top_p)
        return scaled, ids
    kept, ids = top_k(scaled, sampling.top_k)
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(kept, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < sampling.top_p, kept, -jnp.inf)
    return kept, ids


def top_k(
    x: Float[Array, "*batch n"], k: int
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The k largest entries in falling order and their indices, as `lax.top_k`, without a sort.

    Whatever is among the k largest lies in one of the k groups of neighbours with the largest
    maxima, ties towards the lower index: if some group with an entry x_i is none of these, each of
    them has an entry that is larger, or equal and before x_i.
    """
    size = x.shape[-1]
    count = -(-size // _GROUP)
    if count <= 2 * k:
        return lax.top_k(x, k)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, count * _GROUP - size)]
    groups = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(*x.shape[:-1], count, _GROUP)
    _, chosen = lax.top_k(jnp.max(groups, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)
    among = jnp.take_along_axis(groups, chosen[..., None], axis=-2)
    largest, places = lax.top_k(among.reshape(*x.shape[:-1], k * _GROUP), k)
    group = jnp.take_along_axis(chosen, places // _GROUP, axis=-1)
    return largest, group * _GROUP + places % _GROUP


def gumbel_noise(
    keys: Key[Array, "*batch"], ids: Int[Array, "*#batch n"]
) -> Float[Array, "*batch n"]:
    """Standard Gumbel noise of token `ids` under each key, f32 and finite."""
    data = jax.random.key_data(keys)
    if data.shape[-1] != 2:
        raise ValueError(
            f"Draws need threefry keys, `jax.random.key(seed, impl='threefry2x32')`."
            f" Got: {jax.random.key_impl(keys)}"
        )
    bits = _threefry_bits(data[..., :1], data[..., 1:], ids.astype(jnp.uint32))
    # 23 random bits, centred in their cells: never 0 and never 1.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2**-23)
    return -jnp.log(-jnp.log(uniform))


def _nucleus(logits: Float[Array, "*batch V"], top_p: float) -> Float[Array, "*batch V"]:
    """Top-p over the whole vocabulary, by bisection instead of a sort.

    The mass of strictly more likely tokens falls as a token's probability rises, and
    non-negative floats are ordered like their bits, so 31 halvings of the bit pattern find the
    least probability for which it is below top_p. Of the tokens that have just this
    probability, those of the lowest ids stay that the mass still has room for.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(bits > middle, probabilities, 0.0), axis=-1, keepdims=True)
        enough = above < top_p
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    shape = (*logits.shape[:-1], 1)
    one = lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, one, jnp.int32))
    threshold, _ = lax.fori_loop(0, 31, halve, bounds)
    # Rounding may leave no token at or above the threshold's bits; the most likely one stays.
    threshold = jnp.minimum(threshold, jnp.max(bits, axis=-1, keepdims=True))
    above = jnp.sum(jnp.where(bits > threshold, probabilities, 0.0), axis=-1, keepdims=True)
    tied = bits == threshold
    earlier = jnp.cumsum(tied, axis=-1) - 1
    fits = above + earlier * probabilities < top_p
    return jnp.where((bits > threshold) | (tied & fits), logits, -jnp.inf)


def _argmax(x: Float[Array, "*batch n"]) -> Int[Array, "*batch"]:
    """Index of the largest entry, the lowest one of equals.

    `top_k` is a call of its own: XLA on CPU would fuse what computes `x` into the two-valued
    reduction of `argmax` and then run both without vector instructions.
    """
    return lax.top_k(x, 1)[1][..., 0]


def _threefry_bits(
    key_high: UInt32[Array, "*batch 1"],
    key_low: UInt32[Array, "*batch 1"],
    counter: UInt32[Array, "*#batch n"],
) -> UInt32[Array, "*batch n"]:
    """Threefry-2x32 of the 64-bit counter, its two output words combined by exclusive or.

    Written out because `jax.random` generates a range of counters only, and here just those
    of the ids left after top-k are needed. Salmon et al. 2011, 20 rounds.
    """
    keys = (key_high, key_low, key_high ^ key_low ^ jnp.uint32(0x1BD11BDA))
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    x = jnp.zeros_like(counter) + keys[0]
    y = counter + keys[1]
    for group in range(5):
        for distance in rotations[group % 2]:
            x = x + y
            y = ((y << distance) | (y >> (32 - distance))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x ^ y
