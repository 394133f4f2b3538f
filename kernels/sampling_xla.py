"""The fused draw in plain XLA: a vocabulary held as arrays, or as shards of them.

Letters as in `kernels.sampling_algorithm`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from kernels.sampling_algorithm import (
    BITS_ALONE,
    Column,
    Drawn,
    Elementwise,
    Vocabulary,
    Warpers,
    as_drawn,
    draw,
    ordinal,
    words_of,
)

# Shards ask for 15 thresholds at a time, to talk less often.
_BITS_SHARDED = 4


def reference(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    warpers: Warpers,
    axis_name: str | None = None,
) -> Drawn:
    """`fused_draw` in plain XLA."""
    return as_drawn(draw(Arrays(logits, axis_name), words_of(key_data), warpers))


class Arrays(Vocabulary):
    """Held as arrays; with an axis name, as this device's shard of arrays."""

    def __init__(self, logits: Float[Array, "R V"], axis_name: str | None):
        self.axis_name = axis_name
        self.rows, local = logits.shape
        self.bits = BITS_ALONE if axis_name is None else _BITS_SHARDED
        self.size = local * (1 if axis_name is None else lax.axis_size(axis_name))
        first = 0 if axis_name is None else lax.axis_index(axis_name) * local
        self.ids = first + lax.broadcasted_iota(jnp.int32, (1, local), 1)
        self.values = {"logits": logits}

    def _apply(self, fn: Elementwise, sources: tuple[str, ...]) -> Array:
        return fn(self.ids, *(self.values[name] for name in sources))

    def assign(self, name, fn, *sources):
        # Computed once: two fusions could round it differently, and it is compared for equality.
        self.values[name] = lax.optimization_barrier(self._apply(fn, sources))

    def total(self, fn, *sources):
        return self.across(lax.psum, jnp.sum(self._apply(fn, sources), axis=-1, keepdims=True))

    def largest(self, fn, *sources):
        return self.across(lax.pmax, jnp.max(self._apply(fn, sources), axis=-1, keepdims=True))

    def weight_from(self, thresholds, order, weight):
        ordinals = ordinal(self.values[order])
        weights = jnp.float32(1) if weight is None else self.values[weight]
        found = [
            jnp.sum(jnp.where(ordinals >= threshold, weights, 0.0), axis=-1, keepdims=True)
            for threshold in thresholds
        ]
        return self.split(self.across(lax.psum, jnp.concatenate(found, axis=-1)))

    def across(self, reduce: Callable, x: Array) -> Array:
        return x if self.axis_name is None else reduce(x, self.axis_name)

    @staticmethod
    def split(columns: Float[Array, "R n"]) -> list[Column]:
        return jnp.split(columns, columns.shape[-1], axis=-1)
