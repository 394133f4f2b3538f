"""Normalisers of rows of logits, by a kernel of our own on CPUs; see `cpu/logsumexp.cc`.

XLA takes several times longer for a row's exponentials and their sum.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import native


def logsumexp_on_cpu(x: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """The logarithm of the sum of exponentials over the last axis; -inf where all are.

    For programs that are lowered for a CPU, where `native.takes` x; has no derivatives.
    """
    *batch, size = x.shape
    shape = jax.ShapeDtypeStruct((math.prod(batch),), jnp.float32)
    call = jax.ffi.ffi_call(native.LOGSUMEXP, shape, vmap_method="sequential")
    return call(x.reshape(-1, size)).reshape(batch)
