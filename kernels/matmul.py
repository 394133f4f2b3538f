"""The product of activations with a weight matrix, by a kernel of our own on CPUs.

XLA's products of a decode step's few rows with a weight matrix, and those of a value network's
many, take longer on a CPU than they need to: `experiments.benchmarks.cpu_kernels` says by how
much, and `cpu/matmul.cc` what is done instead. Every row that the kernel computes is the same
whatever rows stand beside it.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jaxtyping import Array, Float

from kernels import native

FEWEST_ROWS = 4
"""Fewer are left to XLA, whose products of single rows copy nothing."""


def matmul(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """`x @ w`.

    The kernel takes it where the program is lowered for one CPU device, both are f32, and there
    are `FEWEST_ROWS` rows; XLA takes it elsewhere, and takes its derivatives everywhere.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x and w must be [M, K] and [K, N]. Got: {x.shape} and {w.shape}")
    return _product(x, w, False) if _takes(x, w) else x @ w


def matmul_transposed(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """`x @ w.T`, as `matmul`."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x and w must be [M, K] and [N, K]. Got: {x.shape} and {w.shape}")
    return _product(x, w, True) if _takes(x, w) else _by_xla(x, w, True)


def _takes(x: Array, w: Array) -> bool:
    return x.shape[0] >= FEWEST_ROWS and native.takes(x, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)  # lowered once for all layers
def _product(x, w, transposed):
    return lax.platform_dependent(
        x,
        w,
        cpu=functools.partial(_on_cpu, transposed=transposed),
        default=functools.partial(_by_xla, transposed=transposed),
    )


@_product.defjvp
def _tangent(transposed, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    change = _by_xla(dx, w, transposed) + _by_xla(x, dw, transposed)
    return _product(x, w, transposed), change


def _by_xla(x, w, transposed):
    return lax.dot_general(x, w, (((1,), (int(transposed),)), ((), ())))


def _on_cpu(x, w, transposed):
    name = native.MATMUL_TRANSPOSED if transposed else native.MATMUL
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[0 if transposed else 1]), x.dtype)
    return jax.ffi.ffi_call(name, shape, vmap_method="sequential")(x, w)
