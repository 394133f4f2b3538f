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
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# Finite, so that an empty part yields exp(0) * 0 rather than exp(-inf + inf).
_HIDDEN = -1e30

# Longer query blocks are processed in slices of this length to bound the score matrix.
_QUERY_BLOCK = 512


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


def partial_attention(
    queries: Float[Array, "*batch length kv_heads group head_dim"],
    keys: Float[Array, "*part kv_heads slots head_dim"],
    values: Float[Array, "*part kv_heads slots head_dim"],
    visible: Bool[Array, "*batch length slots"],
    softcap: float | None = None,
) -> Partial:
    """Attends from scaled queries to one part, whose leading axes are a prefix of theirs."""
    *batch, length, kv_heads, group, head_dim = queries.shape
    part = keys.shape[:-3]
    slots = keys.shape[-2]
    rows = math.prod(batch[len(part) :]) * length

    # [*part, kv_heads, rows * group, head_dim]: one matrix product per shared cache.
    q = queries.reshape(*part, rows, kv_heads, group, head_dim)
    q = jnp.moveaxis(q, -4, -3).reshape(*part, kv_heads, rows * group, head_dim)
    scores = jnp.einsum("...qd,...sd->...qs", q, keys, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    seen = visible.reshape(*part, 1, rows, 1, slots)
    scores = scores.reshape(*part, kv_heads, rows, group, slots)
    scores = jnp.where(seen, scores, _HIDDEN)
    maximum = jnp.max(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - maximum[..., None]), 0.0)
    denominator = jnp.sum(weights, axis=-1)
    numerator = jnp.einsum(
        "...qs,...sd->...qd",
        weights.reshape(*part, kv_heads, rows * group, slots).astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )

    def to_query_order(x, *trailing):
        x = x.reshape(*part, kv_heads, rows, group, *trailing)
        x = jnp.moveaxis(x, len(part), len(part) + 1)
        return x.reshape(*batch, length, kv_heads, group, *trailing)

    return Partial(
        numerator=to_query_order(numerator, head_dim),
        denominator=to_query_order(denominator),
        maximum=to_query_order(maximum),
    )


def merge(parts: Sequence[Partial]) -> Float[Array, "*batch length kv_heads group head_dim"]:
    """The attention output of all parts together, f32."""
    maximum = parts[0].maximum
    for part in parts[1:]:
        maximum = jnp.maximum(maximum, part.maximum)
    scales = [jnp.exp(part.maximum - maximum) for part in parts]
    numerator = sum(
        scale[..., None] * part.numerator for scale, part in zip(scales, parts, strict=True)
    )
    denominator = sum(scale * part.denominator for scale, part in zip(scales, parts, strict=True))
    return numerator / jnp.maximum(denominator, 1e-37)[..., None]


def attend(
    queries: Float[Array, "*batch length kv_heads group head_dim"],
    parts: Sequence[tuple[Array, Array, Array]],
    softcap: float | None = None,
) -> Float[Array, "*batch length kv_heads group head_dim"]:
    """Attends to `parts`, each `(keys, values, visible)` as in `partial_attention`."""

    def attend_block(queries, masks):
        return merge(
            [
                partial_attention(queries, keys, values, visible, softcap)
                for (keys, values, _), visible in zip(parts, masks, strict=True)
            ]
        )

    masks = [visible for _, _, visible in parts]
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
