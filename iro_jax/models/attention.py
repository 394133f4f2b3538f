"""Attention over keys that live in several places.

A candidate's past lies in three parts: its prompt's cache, shared by every candidate of
the prompt; its beam's cache, shared by the beam's successors; and its own chunk. Queries
attend to each part where it lies, and the partial results are merged as one softmax:

    part p:   m_p = max_s score_s,   w_s = exp(score_s - m_p),   n_p = sum_s w_s v_s,
              d_p = sum_s w_s
    merged:   m = max_p m_p,   out = sum_p exp(m_p - m) n_p / sum_p exp(m_p - m) d_p

A part with no visible key has weight zero, and a query that sees nothing gets zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models.cache import pack

# Finite, so that an empty part yields exp(0) * 0 rather than exp(-inf + inf).
_HIDDEN = -1e30

# Longer query blocks are processed in slices of this length to bound the score matrix.
_QUERY_BLOCK = 512

# Where only some slots are used, they are attended to in blocks of this length: the scores of one
# stay in a core's cache.
SLOT_BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partial:
    """Attention over one part, not yet normalised. All f32.

    The leading axes are those of the queries: `[..., length, kv_heads, group]`.

    Attributes:
      numerator: weighted values, `[..., length, kv_heads, group, head_dim]`.
      denominator: sum of the weights.
      maximum: the score that the weights are relative to.
    """

    numerator: Float[Array, "*batch length kv_heads group head_dim"]
    denominator: Float[Array, "*batch length kv_heads group"]
    maximum: Float[Array, "*batch length kv_heads group"]


class Part(NamedTuple):
    """One place where keys lie.

    Attributes:
      keys, values: `[*part, kv_heads, slots, head_dim]`; the leading axes are a prefix of the
        queries'.
      visible: which slots each query attends to, `[*batch, length, slots]`.
      used: how many slots, from the left, may be visible to anybody; the others cost nothing.
        None for all, which then take a gradient.
    """

    keys: Array
    values: Array
    visible: Array
    used: Int[Array, ""] | None = None


def partial_attention(
    queries: Float[Array, "*batch length kv_heads group head_dim"],
    part: Part,
    softcap: float | None = None,
) -> Partial:
    """Attends from scaled queries to one part."""
    *batch, length, kv_heads, group, head_dim = queries.shape
    lead = part.keys.shape[:-3]
    slots = part.keys.shape[-2]
    rows = math.prod(batch[len(lead) :]) * length

    # [*part, kv_heads, rows * group, head_dim]: one matrix product per shared cache.
    q = queries.reshape(*lead, rows, kv_heads, group, head_dim)
    q = jnp.moveaxis(q, -4, -3).reshape(*lead, kv_heads, rows * group, head_dim)
    seen = part.visible.reshape(*lead, 1, rows, 1, slots)
    whole = functools.partial(_attend_rows, q, part.keys, part.values, seen, softcap)
    if part.used is None:
        found = whole()
    else:
        by_block = functools.partial(
            _attend_used, q, part.keys, part.values, seen, softcap, part.used
        )
        # A GPU asks the host whether a loop goes on, which costs more than it saves.
        found = lax.platform_dependent(default=by_block, cuda=whole, rocm=whole)

    def to_query_order(x: Array) -> Array:
        trailing = x.shape[len(lead) + 3 :]
        x = jnp.moveaxis(x, len(lead), len(lead) + 1)
        return x.reshape(*batch, length, kv_heads, group, *trailing)

    return jax.tree.map(to_query_order, found)


def _attend_rows(
    q: Float[Array, "*part kv_heads row_groups head_dim"],
    keys: Float[Array, "*part kv_heads slots head_dim"],
    values: Float[Array, "*part kv_heads slots head_dim"],
    seen: Bool[Array, "*part 1 rows 1 slots"],
    softcap: float | None,
) -> Partial:
    """The partial result in the order `[*part, kv_heads, rows, group, ...]`."""
    rows, slots = seen.shape[-3], seen.shape[-1]
    by_row = (*q.shape[:-2], rows, q.shape[-2] // rows)
    scores = jnp.einsum("...qd,...sd->...qs", q, keys, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores.reshape(*by_row, slots), _HIDDEN)
    maximum = jnp.max(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - maximum[..., None]), 0.0)
    numerator = jnp.einsum(
        "...qs,...sd->...qd",
        weights.reshape(*q.shape[:-1], slots).astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return Partial(
        numerator=numerator.reshape(*by_row, q.shape[-1]),
        denominator=jnp.sum(weights, axis=-1),
        maximum=maximum,
    )


def _attend_used(
    q: Float[Array, "*part kv_heads row_groups head_dim"],
    keys: Float[Array, "*part kv_heads slots head_dim"],
    values: Float[Array, "*part kv_heads slots head_dim"],
    seen: Bool[Array, "*part 1 rows 1 slots"],
    softcap: float | None,
    used: Int[Array, ""],
) -> Partial:
    """As `_attend_rows`, block by block as far as slots are used."""
    rows, slots = seen.shape[-3], seen.shape[-1]
    size = min(slots, SLOT_BLOCK)

    def attend_next(index: Array, so_far: Partial) -> Partial:
        # The last block may begin early; what the one before it has seen stays hidden.
        start = jnp.minimum(index * size, slots - size)
        fresh = start + jnp.arange(size) >= index * size

        def block(x: Array, axis: int) -> Array:
            return lax.dynamic_slice_in_dim(x, start, size, axis)

        return _join(
            so_far,
            _attend_rows(q, block(keys, -2), block(values, -2), block(seen, -1) & fresh, softcap),
        )

    by_row = (*q.shape[:-2], rows, q.shape[-2] // rows)
    nothing = Partial(
        numerator=jnp.zeros((*by_row, q.shape[-1]), jnp.float32),
        denominator=jnp.zeros(by_row, jnp.float32),
        maximum=jnp.full(by_row, _HIDDEN, jnp.float32),
    )
    return lax.fori_loop(0, -(-used // size), attend_next, nothing)


def _join(one: Partial, other: Partial) -> Partial:
    maximum = jnp.maximum(one.maximum, other.maximum)
    scales = jnp.exp(one.maximum - maximum), jnp.exp(other.maximum - maximum)
    return Partial(
        numerator=scales[0][..., None] * one.numerator + scales[1][..., None] * other.numerator,
        denominator=scales[0] * one.denominator + scales[1] * other.denominator,
        maximum=maximum,
    )


def merge(parts: Sequence[Partial]) -> Float[Array, "*batch length kv_heads group head_dim"]:
    """The attention output of all parts together, f32."""
    joined = functools.reduce(_join, parts)
    return joined.numerator / jnp.maximum(joined.denominator, 1e-37)[..., None]


def attend(
    queries: Float[Array, "*batch length kv_heads group head_dim"],
    parts: Sequence[Part],
    softcap: float | None = None,
) -> Float[Array, "*batch length kv_heads group head_dim"]:
    """Attends to all parts together."""

    def attend_block(queries, masks):
        return merge(
            [
                partial_attention(queries, part._replace(visible=visible), softcap)
                for part, visible in zip(parts, masks, strict=True)
            ]
        )

    masks = [part.visible for part in parts]
    lead = queries.ndim - 4
    length = queries.shape[lead]
    if length <= _QUERY_BLOCK:
        return attend_block(queries, masks)
    count = -(-length // _QUERY_BLOCK)

    def to_blocks(x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * _QUERY_BLOCK - length)
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], count, _QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    blocks = lax.map(
        lambda block: attend_block(*block),
        (to_blocks(queries, lead), [to_blocks(mask, lead) for mask in masks]),
    )
    joined = jnp.moveaxis(blocks, 0, lead)
    joined = joined.reshape(*queries.shape[:lead], count * _QUERY_BLOCK, *queries.shape[lead + 1 :])
    return lax.slice_in_dim(joined, 0, length, axis=lead)


def attend_without_gradient(
    queries: Float[Array, "*batch length kv_heads group head_dim"],
    parts: Sequence[Part],
    softcap: float | None = None,
) -> Float[Array, "*batch length kv_heads group head_dim"]:
    """As `attend`; on a CPU by one kernel for all parts, which has no derivatives."""
    from kernels import native  # Pallas, beside it, takes a third of a second to import

    arrays = [queries, *(x for part in parts for x in (part.keys, part.values))]
    if softcap is not None or not native.takes(*arrays):
        return attend(queries, parts, softcap)
    return _attend_by_platform(queries, tuple(parts))


@jax.jit  # traced and lowered once for all layers
def _attend_by_platform(queries: Array, parts: tuple[Part, ...]) -> Array:
    return lax.platform_dependent(queries, parts, cpu=_attend_on_cpu, default=attend)


def _attend_on_cpu(queries: Array, parts: tuple[Part, ...]) -> Array:
    from kernels.attention_cpu import Place, attend_on_cpu

    # Packed as a cache stores them, nothing stands between an update of a cache and its reading.
    places = [Place(pack(part.keys), pack(part.values), part.visible, part.used) for part in parts]
    return attend_on_cpu(queries, places)
