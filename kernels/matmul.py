"""The product of activations with a weight matrix, by a kernel of our own on CPUs.

XLA's products of a decode step's few rows with a weight matrix, and those of a value network's
many, take longer on a CPU than they need to: `experiments.benchmarks.cpu_kernels` says by how
much, and `cpu/matmul.cc` what is done instead. Every row that the kernel computes is the same
whatever rows stand beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels import native

FEWEST_ROWS = 8
"""Fewer are left to XLA, whose products of single rows copy nothing."""


def matmul(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """`x @ w`.

    The kernel takes it where the program is lowered for one CPU device, both are f32, and there
    are `FEWEST_ROWS` rows; XLA takes it elsewhere, and takes its derivatives everywhere.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x and w must be [M, K] and [K, N]. Got: {x.shape} and {w.shape}")
    if x.shape[0] >= FEWEST_ROWS and native.takes(x, w):
        return _product(x, w)
    return x @ w


@jax.custom_jvp
@jax.jit  # lowered once for all layers
def _product(x, w):
    return lax.platform_dependent(x, w, cpu=_on_cpu, default=jnp.matmul)


@_product.defjvp
def _tangent(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return _product(x, w), dx @ w + x @ dw


def _on_cpu(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return jax.ffi.ffi_call(native.MATMUL, shape, vmap_method="sequential")(x, w)
