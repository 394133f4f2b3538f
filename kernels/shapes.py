"""Sizes and shapes that several kernels need."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

# Numbers in a row of a TPU's registers.
LANES = 128


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pad_to(x: Array, axis: int, size: int, fill: int) -> Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding, constant_values=fill)


def result_like(
    x: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = "float32"
) -> jax.ShapeDtypeStruct:
    """A kernel's result, which inside `jax.shard_map` varies over the same mesh axes as `x`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
