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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from iro_jax.models.sharding import automatic_mesh, mesh_axes, partition_spec

if TYPE_CHECKING:
    from kernels import Implementation

PyTree: TypeAlias = Any

# Neighbours of which `top_k` first compares the largest only.
_GROUP = 64
# Sums over a vocabulary are taken for so many lanes first.
_LANES = 128


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
    """Draws one token per row; on one CPU device, without derivatives.

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
        return _draw(keys, logits, sampling, noise)
    return over_vocabulary(functools.partial(_draw, sampling=sampling), keys, logits)


def over_vocabulary(
    function: Callable[..., PyTree], by_row: PyTree, logits: Float[Array, "*batch V"]
) -> PyTree:
    """Calls a function of logits where these lie: no device gets those of the whole vocabulary.

    Args:
      function: of `by_row`, logits and `axis`: the mesh axis that the vocabulary is split over,
        whose devices hold neighbouring parts of one size, or None. What it returns, of the
        batch's leading axes, must be the same on all of these devices.
      by_row: arrays of the batch's shape.
      logits: of the policy.
    """
    mesh = automatic_mesh()
    axes = () if mesh is None else mesh_axes("vocab", mesh)
    if mesh is None or len(axes) != 1 or logits.shape[-1] % mesh.shape[axes[0]]:
        return function(by_row, logits)
    names = ("batch", *(None,) * (logits.ndim - 2), "vocab")
    places = partition_spec(names, logits.shape, mesh)
    rows = PartitionSpec(*places[:-1])
    spread = jax.shard_map(
        functools.partial(function, axis=axes[0]),
        in_specs=(rows, places),
        out_specs=rows,
        check_vma=False,
    )
    return spread(by_row, logits)


def _draw(
    keys: Key[Array, "*batch"],
    logits: Float[Array, "*batch V"],
    sampling: Sampling,
    noise: Float[Array, "*batch V"] | None = None,
    axis: str | None = None,
) -> Draw:
    """As `draw`, from all logits or from a device's part of them."""
    logits = logits.astype(jnp.float32)

    def finish(tokens: Array, drawn: Array, warped_log_probs: Array, largest: Array) -> Draw:
        if axis is None:
            drawn = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        normaliser = _normaliser(logits, largest, axis)
        return Draw(tokens.astype(jnp.int32), drawn - normaliser, warped_log_probs)

    if sampling.temperature == 0:
        tokens, largest = _best(logits, [_token_ids(logits, axis), logits], axis)
        return finish(tokens, largest, jnp.zeros_like(largest), largest)

    kept, ids = _warp(logits, sampling, axis)
    few = _keeps_few(logits, sampling, axis)
    if noise is None:
        noise = gumbel_noise(keys, ids)
    elif few:
        noise = jnp.take_along_axis(noise, ids, axis=-1)
    # A few most likely tokens are known to every device.
    parts = None if few else axis
    tokens, drawn = _best(kept + noise, [ids, kept], parts)
    largest = _maximum(kept, parts)
    mass = largest + jnp.log(_total(jnp.exp(kept - largest[..., None]), parts))
    return finish(
        tokens, sampling.temperature * drawn, drawn - mass, sampling.temperature * largest
    )


def top_tokens(
    logits: Float[Array, "*batch V"], k: int
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """The k most likely tokens in falling order: log-probabilities, f32, and ids."""

    def of_part(_, logits, axis=None):
        logits = logits.astype(jnp.float32)
        largest = _maximum(logits, axis)[..., None]
        shifted = logits - largest
        log_probs = shifted - jnp.log(_total(jnp.exp(shifted), axis))[..., None]
        return _top_k(log_probs, k, axis)

    return over_vocabulary(of_part, (), logits)


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
    vocabulary, its ids of shape `[1, ..., 1, V]`. Temperature 0 is not a distribution. On one CPU
    device, `top_k` is without derivatives.
    """
    if sampling.temperature == 0:
        raise ValueError("Greedy decoding has no warped logits. Got: temperature=0")
    return _warp(logits.astype(jnp.float32), sampling)


def _warp(logits: Array, sampling: Sampling, axis: str | None = None) -> tuple[Array, Array]:
    """As `warp`; of a part of the vocabulary where nothing says how many tokens to keep."""
    if not _keeps_few(logits, sampling, axis):
        scaled = logits / sampling.temperature
        if sampling.top_p < 1:
            scaled = _nucleus(scaled, sampling.top_p, axis)
        return scaled, _token_ids(scaled, axis)
    kept, ids = _most_likely(logits, sampling, axis)
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(kept, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < sampling.top_p, kept, -jnp.inf)
    return kept, ids


def _most_likely(logits: Array, sampling: Sampling, axis: str | None) -> tuple[Array, Array]:
    """The `top_k` largest logits over the temperature, in falling order, and their ids."""
    from kernels import native  # Pallas, beside it, takes a third of a second to import

    temperature, k = sampling.temperature, sampling.top_k
    assert k is not None

    def by_xla(logits: Array) -> tuple[Array, Array]:
        return _top_k(logits / temperature, k, axis)

    def on_cpu(logits: Array) -> tuple[Array, Array]:
        from kernels.top_k_cpu import top_k_on_cpu

        # XLA multiplies by the inverse as well.
        return top_k_on_cpu(logits, k, float(np.float32(1) / np.float32(temperature)))

    if axis is not None or not native.takes(logits):
        return by_xla(logits)
    return lax.platform_dependent(logits, cpu=on_cpu, default=by_xla)


def _keeps_few(logits: Array, sampling: Sampling, axis: str | None) -> bool:
    parts = 1 if axis is None else lax.axis_size(axis)
    return sampling.top_k is not None and sampling.top_k < logits.shape[-1] * parts


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
        largest, places = lax.top_k(x, k)
        return largest, places
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


def _nucleus(
    logits: Float[Array, "*batch V"], top_p: float, axis: str | None = None
) -> Float[Array, "*batch V"]:
    """Top-p over the whole vocabulary, by bisection instead of a sort.

    The mass of strictly more likely tokens falls as a token's probability rises, and
    non-negative floats are ordered like their bits, so 31 halvings of the bit pattern find the
    least probability for which it is below top_p. Of the tokens that have just this
    probability, those of the lowest ids stay that the mass still has room for.
    """
    exponentials = jnp.exp(logits - _maximum(logits, axis)[..., None])
    probabilities = exponentials / _total(exponentials, axis)[..., None]
    bits = lax.bitcast_convert_type(probabilities, jnp.int32)

    def mass_above(threshold):
        return _total(jnp.where(bits > threshold, probabilities, 0.0), axis)[..., None]

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = mass_above(middle) < top_p
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    shape = (*logits.shape[:-1], 1)
    one = lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    bounds = (jnp.zeros(shape, jnp.int32), jnp.full(shape, one, jnp.int32))
    threshold, _ = lax.fori_loop(0, 31, halve, bounds)
    # Rounding may leave no token at or above the threshold's bits; the most likely one stays.
    threshold = jnp.minimum(threshold, _maximum(bits, axis)[..., None])
    tied = bits == threshold
    earlier = jnp.cumsum(tied, axis=-1) - 1 + _in_parts_before(tied, axis)
    fits = mass_above(threshold) + earlier * probabilities < top_p
    return jnp.where((bits > threshold) | (tied & fits), logits, -jnp.inf)


def _token_ids(logits: Float[Array, "*batch V"], axis: str | None) -> Int[Array, "*one V"]:
    """The ids of logits, `[1, ..., 1, V]`."""
    ids = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    return ids if axis is None else ids + lax.axis_index(axis) * logits.shape[-1]


def _maximum(x: Array, axis: str | None) -> Float[Array, "*batch"]:
    """Over the last axis, of all parts."""
    found = jnp.max(x, axis=-1)
    return found if axis is None else lax.pmax(found, axis)


def _total(x: Array, axis: str | None) -> Float[Array, "*batch"]:
    """Over the last axis, of all parts."""
    if x.shape[-1] % _LANES == 0:
        # XLA on CPU adds along the last axis one number after the other, and along others by lanes.
        x = jnp.sum(x.reshape(*x.shape[:-1], -1, _LANES), axis=-2)
    found = jnp.sum(x, axis=-1)
    return found if axis is None else lax.psum(found, axis)


def _normaliser(
    logits: Float[Array, "*batch V"], largest: Float[Array, "*batch"], axis: str | None
) -> Float[Array, "*batch"]:
    """The logarithm of the sum of exponentials of all parts, whose largest logit is known."""
    from kernels import native  # Pallas, beside it, takes a third of a second to import

    def by_xla(logits: Array, largest: Array) -> Array:
        return largest + jnp.log(_total(jnp.exp(logits - largest[..., None]), axis))

    def on_cpu(logits: Array, _: Array) -> Array:
        from kernels.logsumexp_cpu import logsumexp_on_cpu

        return logsumexp_on_cpu(logits)

    if axis is not None or not native.takes(logits):
        return by_xla(logits, largest)
    return lax.platform_dependent(logits, largest, cpu=on_cpu, default=by_xla)


def _in_parts_before(
    marked: Bool[Array, "*batch V"], axis: str | None
) -> int | Int[Array, "*batch 1"]:
    """How many tokens are marked in the parts of lower ids."""
    if axis is None:
        return 0
    counts = lax.all_gather(jnp.sum(marked, axis=-1), axis)
    before = jnp.arange(lax.axis_size(axis)) < lax.axis_index(axis)
    return jnp.tensordot(before.astype(counts.dtype), counts, 1)[..., None]


def _top_k(x: Float[Array, "*batch V"], k: int, axis: str | None) -> tuple[Array, Array]:
    """`top_k` of all parts: the k largest of every part's k largest, which lie in order of ids."""
    if axis is None:
        return top_k(x, k)
    largest, places = top_k(x, min(k, x.shape[-1]))
    ids = places + lax.axis_index(axis) * x.shape[-1]
    largest, ids = lax.all_gather((largest, ids), axis, axis=largest.ndim - 1, tiled=True)
    largest, places = lax.top_k(largest, k)
    return largest, jnp.take_along_axis(ids, places, axis=-1)


def _best(
    scores: Float[Array, "*batch n"], of_each: Sequence[Array], axis: str | None
) -> list[Array]:
    """What belongs to the largest score, the first of equals.

    `top_k` is a call of its own: XLA on CPU would fuse what computes the scores into the
    two-valued reduction of `argmax` and then run both without vector instructions.
    """

    def choose(scores: Array, of_each: Sequence[Array]) -> list[Array]:
        _, place = lax.top_k(scores, 1)
        return [
            jnp.take_along_axis(jnp.broadcast_to(x, scores.shape), place, axis=-1) for x in of_each
        ]

    found = choose(scores, [*of_each, scores])
    if axis is not None:
        *of_parts, best = lax.all_gather(found, axis, axis=scores.ndim - 1, tiled=True)
        found = choose(best, of_parts)
    return [x[..., 0] for x in found[: len(of_each)]]


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
