"""The largest numbers of each row, by a kernel of our own on CPUs; see `cpu/topk.cc`.

XLA compares all numbers with each other in a sort or a heap; the kernel does so with few of them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels import native


def top_k_on_cpu(
    x: Float[Array, "*batch n"], k: int, scale: float = 1.0
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """What `lax.top_k(x * scale, k)` finds: entries in falling order, and their places.

    For programs that are lowered for a CPU, where `native.takes` x; has no derivatives.
    """
    *batch, size = x.shape
    rows = math.prod(batch)
    shapes = (
        jax.ShapeDtypeStruct((rows, k), jnp.float32),
        jax.ShapeDtypeStruct((rows, k), jnp.int32),
    )
    call = jax.ffi.ffi_call(native.TOP_K, shapes, vmap_method="sequential")
    values, ids = call(x.reshape(rows, size), scale=np.float32(scale))
    return values.reshape(*batch, k), ids.reshape(*batch, k)
