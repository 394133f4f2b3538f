"""Rotary embedding of a projection's heads, by a kernel of our own on CPUs; see `cpu/rotate.cc`.

XLA computes number by number which half of a head it stands in, and takes longer for it than for
the attention that follows.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jaxtyping import Array, Float

from kernels import native


def rotate_on_cpu(
    projected: Float[Array, "*batch length kv_heads group+2 size"],
    cosines: Float[Array, "*batch length half"],
    sines: Float[Array, "*batch length half"],
    scale: float,
) -> tuple[
    Float[Array, "*batch length kv_heads group size"],
    Float[Array, "*batch kv_heads length size"],
    Float[Array, "*batch kv_heads length size"],
]:
    """Queries, rotated and scaled, keys, rotated, and values.

    For programs that are lowered for a CPU, where `native.takes` the operands; has no derivatives.
    """
    *batch, length, kv_heads, slices, size = projected.shape
    rows, half = math.prod(batch) * length, cosines.shape[-1]
    kept = (math.prod(batch), kv_heads, length, size)
    shapes = ((rows, kv_heads, slices - 2, size), kept, kept)
    call = jax.ffi.ffi_call(
        native.ROTATE,
        tuple(jax.ShapeDtypeStruct(shape, projected.dtype) for shape in shapes),
        vmap_method="sequential",
    )
    queries, keys, values = call(
        projected.reshape(rows, kv_heads, slices, size),
        cosines.reshape(rows, half),
        sines.reshape(rows, half),
        scale=np.float32(scale),
    )
    lead = (*batch, kv_heads, length, size)
    queries = queries.reshape(*batch, length, kv_heads, slices - 2, size)
    return queries, keys.reshape(lead), values.reshape(lead)
