"""A vocabulary in a kernel's memory, processed a chunk of tokens at a time.

Letters as in `kernels.sampling_algorithm`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.sampling_algorithm import BITS_ALONE, Elementwise, Vocabulary, ordinal
from kernels.shapes import result_like


class Tile(Vocabulary):
    """Rows that a kernel holds behind references, one for each name."""

    bits = BITS_ALONE

    def __init__(self, refs: dict[str, Any], size: int, chunk: int):
        self.refs, self.size = refs, size
        self.rows, padded = refs["logits"].shape
        self.chunk = min(chunk, padded)
        self.chunks = padded // self.chunk

    def load(self, name: str, start: Array) -> Float[Array, "R m"]:
        values = self.refs[name][:, pl.ds(start, self.chunk)]
        if name == "logits" and self.size % self.chunk:
            values = jnp.where(self.ids(start) < self.size, values, -jnp.inf)
        return values

    def assign(self, name, fn, *sources):
        @pl.loop(0, self.chunks)
        def _(i):
            values = self.apply(fn, sources, i)
            self.refs[name][:, pl.ds(self.start(i), self.chunk)] = values

    def ids(self, start: Array) -> Int[Array, "1 m"]:
        return start + lax.broadcasted_iota(jnp.int32, (1, self.chunk), 1)

    def start(self, i: Array) -> Array:
        return pl.multiple_of(i * self.chunk, self.chunk)

    def apply(self, fn: Elementwise, sources: tuple[str, ...], i: Array) -> Array:
        start = self.start(i)
        return fn(self.ids(start), *(self.load(name, start) for name in sources))

    def total(self, fn, *sources):
        def add(i, total):
            return total + self.apply(fn, sources, i)

        zeros = jnp.zeros((self.rows, self.chunk), jnp.float32)
        total = lax.fori_loop(0, self.chunks, add, zeros)
        return jnp.sum(total, axis=-1, keepdims=True)

    def largest(self, fn, *sources):
        def maximum(i, largest):
            return jnp.maximum(largest, self.apply(fn, sources, i))

        lowest = jnp.full((self.rows, self.chunk), -jnp.inf, jnp.float32)
        largest = lax.fori_loop(0, self.chunks, maximum, lowest)
        return jnp.max(largest, axis=-1, keepdims=True)

    def weight_from(self, thresholds, order, weight):
        def weights(threshold, ids, ordered, *weighed):
            del ids
            one = weighed[0] if weighed else jnp.float32(1)
            return jnp.where(ordinal(ordered) >= threshold, one, 0.0)

        sources = (order,) if weight is None else (order, weight)
        return [self.total(functools.partial(weights, t), *sources) for t in thresholds]


def registers(logits_ref: Any, scaled_ref: Any, other_ref: Any) -> dict[str, Any]:
    """Where a kernel keeps what `draw` assigns. Probabilities are not needed with scores."""
    return {
        "logits": logits_ref,
        "scaled": scaled_ref,
        "probability": other_ref,
        "score": other_ref,
    }


def columns_like(logits: Float[Array, "R V"]) -> list[jax.ShapeDtypeStruct]:
    shape = (logits.shape[0], 1)
    return [result_like(logits, shape, dtype) for dtype in ("int32", "float32", "float32")]
