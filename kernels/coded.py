"""Weights that take few values, as codes: the same numbers in a fraction of the bytes.

Checkpoints that were quantised (GGUF's Q4_0 to Q8_0) hold blocks of 32 weights that lie on a line,
`slope * code + offset`, with codes of a few bits; with the lines, 6 or 10 bits a weight. Where
memory bounds a product, as it does for a decode step's few rows, a kernel that reads the codes and
computes the weights in its registers is faster than one that reads them as f32. `encode` finds the
lines in the numbers themselves, whatever file they came from, and only where they give every
number exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import native

BLOCK = 32
"""Inputs whose weights for one output share a line."""
WIDTH = 48
"""Outputs of a stripe, which lies in one piece: a multiple of what the kernel has registers for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """A matrix of weights `[K, N]`; see `cpu/weights.h` for how it is read.

    Attributes:
      words: codes of neighbouring inputs, the first in the lowest bits, stripe by stripe; the last
        stripe is filled up.
      lines: slopes and offsets.
      num_outputs: N.
    """

    words: Int[Array, "stripes K*bits/32 48"]
    lines: Float[Array, "stripes K/32 2 48"]
    num_outputs: int = dataclasses.field(metadata={"static": True})

    @property
    def num_inputs(self) -> int:
        return self.lines.shape[1] * BLOCK

    @property
    def bits(self) -> int:
        """Of a code."""
        return 32 * self.words.shape[1] // self.num_inputs

    def whole(self) -> Float[Array, "K N"]:
        """The weights as they were."""
        stripes = self._numbers(self.words, self.lines)
        return jnp.moveaxis(stripes, 0, 1).reshape(self.num_inputs, -1)[:, : self.num_outputs]

    def outputs(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch K"]:
        """The weights of some outputs, `whole().T[indices]`, for indices from 0 to N - 1."""
        stripe, place = indices // WIDTH, indices % WIDTH
        words, lines = self.words[stripe, :, place], self.lines[stripe, :, :, place]
        return self._numbers(words[..., None], lines[..., None])[..., 0]

    def _numbers(self, words: Array, lines: Array) -> Array:
        """`[..., K, width]`, from words and lines of the same outputs."""
        *lead, _, width = words.shape
        shifts = self.bits * jnp.arange(32 // self.bits, dtype=jnp.int32)
        codes = (words[..., None, :] >> shifts[:, None]) & (2**self.bits - 1)
        codes = codes.reshape(*lead, -1, BLOCK, width).astype(jnp.float32)
        numbers = lines[..., :1, :] * codes + lines[..., 1:, :]
        return numbers.reshape(*lead, self.num_inputs, width)


def encode(w: Float[Array, "K N"], *, transposed: bool = False) -> Coded | None:
    """The same weights as codes of 4 or 8 bits; None if not all of them are such numbers.

    Zeros may change their sign. On one CPU device, where kernels can be called; None elsewhere.

    Args:
      transposed: `w` is stored as its transpose, `[N, K]`.
    """
    if w.ndim != 2 or 0 in w.shape or w.shape[transposed] % BLOCK or not native.takes(w):
        return None
    for bits in (4, 8):
        words, lines, exact = _encode(w, bits, transposed)
        if exact.all():
            return Coded(words, lines, w.shape[not transposed])
    return None


def matmul_coded(x: Float[Array, "M K"], w: Coded) -> Float[Array, "M N"]:
    """`x @ w.whole()`; where `kernels.matmul` is a kernel, the same numbers as it gives.

    On one CPU device it is a kernel for any number of rows, in f32. XLA decodes all weights at
    every call elsewhere, and takes the derivatives everywhere.
    """
    if x.ndim != 2 or x.shape[1] != w.num_inputs:
        raise ValueError(f"x must be [M, {w.num_inputs}]. Got: {x.shape}")
    if not native.takes(x):
        return _by_xla(x, w)
    return _product(x, w)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode(w: Array, bits: int, transposed: bool) -> Sequence[Array]:
    """Words, lines, and of which stripes they give the weights back."""
    inputs, outputs = w.shape[transposed], w.shape[not transposed]
    stripes = -(-outputs // WIDTH)
    shapes = [
        jax.ShapeDtypeStruct((stripes, inputs * bits // 32, WIDTH), jnp.int32),
        jax.ShapeDtypeStruct((stripes, inputs // BLOCK, 2, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((stripes,), jnp.int32),
    ]
    return jax.ffi.ffi_call(native.ENCODE_TRANSPOSED if transposed else native.ENCODE, shapes)(w)


@jax.custom_jvp
@jax.jit  # lowered once for all layers
def _product(x: Array, w: Coded) -> Array:
    return lax.platform_dependent(x, w, cpu=_on_cpu, default=_by_xla)


@_product.defjvp
def _tangent(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    dense = functools.partial(_by_lines, w)
    _, change = jax.jvp(dense, (x, w.lines), (dx, dw.lines))
    return _product(x, w), change


def _by_lines(w: Coded, x: Array, lines: Array) -> Array:
    return _by_xla(x, dataclasses.replace(w, lines=lines))


def _by_xla(x: Array, w: Coded) -> Array:
    return x @ w.whole().astype(x.dtype)


def _on_cpu(x: Array, w: Coded) -> Array:
    shape = jax.ShapeDtypeStruct((x.shape[0], w.num_outputs), x.dtype)
    call = jax.ffi.ffi_call(native.MATMUL_CODED, shape, vmap_method="sequential")
    return call(x, w.words, w.lines)
