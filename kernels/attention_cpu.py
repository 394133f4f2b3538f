"""Attention over keys in several parts, by a kernel of our own on CPUs; see `cpu/attention.cc`.

XLA computes each part's scores, maxima, weights and sums in loops of their own over small arrays,
and starts all threads for each: two thirds of a decode step's time beside its products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import native


class Place(NamedTuple):
    """One part: `places` caches of equal size, each of as many neighbouring tokens.

    Attributes:
      keys, values: of the part.
      visible: which slots of its place each token attends to.
      used: how many slots, from the left, may be visible to anybody; None for all.
    """

    keys: Float[Array, "places heads slots size"]
    values: Float[Array, "places heads slots size"]
    visible: Bool[Array, "T slots"]
    used: Int[Array, ""] | None = None


def attend_on_cpu(
    queries: Float[Array, "T heads group size"], parts: Sequence[Place]
) -> Float[Array, "T heads group size"]:
    """Attends from scaled queries to all parts together.

    A query that sees nothing gets zeros. For programs that are lowered for a CPU, where
    `native.takes` the queries, keys and values; has no derivatives.
    """
    operands = [
        operand
        for keys, values, visible, used in parts
        for operand in (keys, values, visible, jnp.int32(keys.shape[2]) if used is None else used)
    ]
    shape = jax.ShapeDtypeStruct(queries.shape, queries.dtype)
    return jax.ffi.ffi_call(native.ATTEND, shape, vmap_method="sequential")(queries, *operands)
