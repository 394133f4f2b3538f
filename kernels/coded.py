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


def encode(w: Float[Array, "K N"]) -> Coded | None:
    """The same weights as codes of 4 or 8 bits; None if not all of them are such numbers.

    Zeros may change their sign.
    """
    if w.ndim != 2 or w.dtype != jnp.float32 or w.shape[0] % BLOCK or 0 in w.shape:
        return None
    for bits in (4, 8):
        words, lines, exact = _encode(w, bits)
        if exact:
            return Coded(words, lines, w.shape[1])
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


@functools.partial(jax.jit, static_argnums=1)
def _encode(w: Array, bits: int) -> tuple[Array, Array, Array]:
    """Words, lines, and whether they give the weights back."""
    blocks = w.reshape(-1, BLOCK, w.shape[1])
    low, high = jnp.min(blocks, 1, keepdims=True), jnp.max(blocks, 1, keepdims=True)
    largest = jnp.maximum(high, -low)
    # How Q4_1 and Q4_0, or Q8_0, Q5_0 and Q5_1, choose their slopes, which are f16: times a code,
    # they are exact in f32.
    slopes = (
        ((high - low) / 15, largest / 8)
        if bits == 4
        else (largest / 127, largest / 16, (high - low) / 31)
    )
    codes, slope = jnp.zeros(blocks.shape, jnp.int32), jnp.zeros_like(low)
    exact = jnp.zeros(low.shape, bool)
    for tried in slopes:
        tried = tried.astype(jnp.float16).astype(jnp.float32)
        found = jnp.rint((blocks - low) / jnp.where(tried == 0, 1, tried))
        same = (tried * found + low == blocks) & (found < 2**bits)
        better = ~exact & jnp.all(same, axis=1, keepdims=True)
        codes = jnp.where(better, found.astype(jnp.int32), codes)
        slope = jnp.where(better, tried, slope)
        exact |= better
    each = 32 // bits
    shifts = bits * jnp.arange(each, dtype=jnp.int32)[:, None]
    shifted = codes.reshape(-1, each, w.shape[1]) << shifts
    words = jnp.sum(shifted, axis=1, dtype=jnp.int32)  # their bits are apart
    return _stripes(words), _stripes(jnp.concatenate([slope, low], axis=1)), jnp.all(exact)


def _stripes(x: Array) -> Array:
    """`[*lead, N]` to `[stripes, *lead, WIDTH]`."""
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % WIDTH)])
    return jnp.moveaxis(filled.reshape(*x.shape[:-1], -1, WIDTH), -2, 0)


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
