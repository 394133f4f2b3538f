"""The parts that candidates attend to, and the rows of queries that share one.

Letters as in `kernels.prefix_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Part(NamedTuple):
    """Keys and values of one part; `lead` is `[P]`, `[P, K]` or `[P, K, B]`.

    Attributes:
      keys: rotated keys, `[*lead, kv_heads, slots, D]`.
      values: like `keys`.
      positions: position of each slot's token, -1 where it is empty, `[*lead, slots]`.
    """

    keys: Float[Array, "*lead kv_heads slots D"]
    values: Float[Array, "*lead kv_heads slots D"]
    positions: Int[Array, "*lead slots"]


def may_attend(
    queries: Int[Array, "*#shape"], slots: Int[Array, "*#shape"], window: int | None
) -> Bool[Array, "*shape"]:
    """Which slots each query may attend to, by their positions."""
    seen = (slots != -1) & (slots <= queries)
    if window is not None:
        seen &= slots > queries - window
    return seen


def to_rows(
    queries: Float[Array, "P K B kv_heads G D"], axes: int
) -> Float[Array, "*lead kv_heads rows D"]:
    """The queries that share a part whose leading axes are the first `axes` of theirs."""
    lead, (kv_heads, group, head_dim) = queries.shape[:axes], queries.shape[3:]
    x = queries.reshape(*lead, -1, kv_heads, group, head_dim)
    return jnp.swapaxes(x, axes, axes + 1).reshape(*lead, kv_heads, -1, head_dim)


def from_rows(
    x: Float[Array, "*lead kv_heads rows n"], shape: tuple[int, ...]
) -> Float[Array, "*P_K_B kv_heads G n"]:
    """Undoes `to_rows`: to queries' `shape`, but for the size of the last axis."""
    *lead, kv_heads, _, size = x.shape
    x = x.reshape(*lead, kv_heads, -1, shape[-2], size)
    return jnp.swapaxes(x, len(lead), len(lead) + 1).reshape(*shape[:-1], size)


def to_row_positions(
    positions: Int[Array, "P K B"], axes: int, group: int
) -> Int[Array, "*lead rows"]:
    return jnp.repeat(positions.reshape(*positions.shape[:axes], -1), group, axis=-1)
