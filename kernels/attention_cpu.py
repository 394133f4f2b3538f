"""Attention over keys in several parts, by a kernel of our own on CPUs; see `cpu/attention.cc`.

XLA computes each part's scores, maxima, weights and sums in loops of their own over small arrays,
and starts all threads for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels import native


class Place(NamedTuple):
    """One part: caches of equal size, each of as many neighbouring tokens.

    Axes of size one may be left out of keys and values, and several stand for `places` and `T`.

    Attributes:
      keys, values: of the part.
      visible: which slots of its place each token attends to.
      used: how many slots, from the left, may be visible to anybody; None for all.
    """

    keys: Float[Array, "*places_and_heads slots size"]
    values: Float[Array, "*places_and_heads slots size"]
    visible: Bool[Array, "*T slots"]
    used: Int[Array, ""] | None = None


def attend_on_cpu(
    queries: Float[Array, "*T heads group size"], parts: Sequence[Place]
) -> Float[Array, "*T heads group size"]:
    """Attends from scaled queries to all parts together.

    A query that sees nothing gets zeros. For programs that are lowered for a CPU, where
    `native.takes` the queries, keys and values; has no derivatives.
    """
    slots = [part.keys.shape[-2] for part in parts]
    operands = [
        operand
        for part, all_slots in zip(parts, slots, strict=True)
        for operand in (*part[:3], jnp.int32(all_slots) if part.used is None else part.used)
    ]
    call = jax.ffi.ffi_call(
        native.ATTEND,
        jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        vmap_method="sequential",
    )
    return call(
        queries,
        *operands,
        shape=np.asarray(queries.shape[-3:], np.int64),
        slots=np.asarray(slots, np.int64),
    )
