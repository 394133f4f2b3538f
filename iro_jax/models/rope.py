"""Rotary position embeddings: their frequencies, their scalings, and the rotation itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths stretched by `factor`, short ones kept, a ramp between."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): a ramp over dimensions and a temperature on the attention."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    attention_factor: float
    truncate: bool = True

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], original_context: int) -> YarnScaling:
        """From the `rope_parameters` of a Hugging Face configuration."""
        factor = float(parameters["factor"])

        def temperature(scale: float | None) -> float:
            return 0.1 * (1.0 if scale is None else scale) * math.log(factor) + 1.0

        scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = parameters.get("attention_factor")
        if attention_factor is None and factor <= 1:
            attention_factor = 1.0
        elif attention_factor is None and scale and scale_all:
            attention_factor = temperature(scale) / temperature(scale_all)
        elif attention_factor is None:
            attention_factor = temperature(None)
        return cls(
            factor=factor,
            beta_fast=float(parameters.get("beta_fast") or 32),
            beta_slow=float(parameters.get("beta_slow") or 1),
            original_context=original_context,
            attention_factor=float(attention_factor),
            truncate=bool(parameters.get("truncate", True)),
        )


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dimension` channels of a head."""

    theta: float
    dimension: int
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


def inverse_frequencies(rope: Rope) -> tuple[np.ndarray, float]:
    """Rotary frequencies and the factor on cosines and sines.

    Computed in f32 in the order that `transformers` uses, because at position p a last-bit
    difference is multiplied by p.

    Returns:
      Frequencies in radians a token, shape `[dimension / 2]`, and the attention factor.
    """
    exponents = np.arange(0, rope.dimension, 2, dtype=np.float32) / np.float32(rope.dimension)
    frequencies = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    match rope.scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling(factor=factor):
            return frequencies / np.float32(factor), 1.0
        case Llama3Scaling() as scaling:
            return _llama3_frequencies(frequencies, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn_frequencies(frequencies, rope, scaling), scaling.attention_factor


def _llama3_frequencies(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    wavelengths = np.float32(2 * np.pi) / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    ramp = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    stretched = frequencies / np.float32(scaling.factor)
    return ((1 - ramp) * stretched + ramp * frequencies).astype(np.float32)


def _yarn_frequencies(frequencies: np.ndarray, rope: Rope, scaling: YarnScaling) -> np.ndarray:
    def dimension_turning(rotations: float) -> float:
        """The channel that turns `rotations` times within the original context."""
        wavelength = scaling.original_context / (rotations * 2 * np.pi)
        return rope.dimension * np.log(wavelength) / (2 * np.log(rope.theta))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, rope.dimension - 1)
    channels = np.arange(rope.dimension // 2, dtype=np.float32)
    ramp = np.clip((channels - low) / max(high - low, 1e-3), 0.0, 1.0).astype(np.float32)
    return frequencies / np.float32(scaling.factor) * ramp + frequencies * (1 - ramp)


def tables(
    rope: Rope, positions: Int[Array, "*batch length"]
) -> tuple[Float[Array, "*batch length half"], Float[Array, "*batch length half"]]:
    """Cosines and sines, f32, for every position; `half` is `rope.dimension / 2`."""
    frequencies, attention_factor = inverse_frequencies(rope)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate_heads(
    projected: Float[Array, "*batch length kv_heads group+2 head_dim"],
    cosines: Float[Array, "*batch length half"],
    sines: Float[Array, "*batch length half"],
    scale: float,
) -> tuple[Array, Array, Array]:
    """What attention needs of one projection, whose slices are queries, a key and a value.

    Args:
      projected: of every token and key head, normed already where the network norms them.
      cosines, sines: from `tables`.
      scale: of the queries.

    Returns:
      Queries, rotated and scaled, `[*batch, length, kv_heads, group, head_dim]`; keys, rotated, and
      values in cache order, `[*batch, kv_heads, length, head_dim]`.
    """
    from kernels import native  # Pallas, beside it, takes a third of a second to import

    if not native.takes(projected, cosines, sines):
        return _rotate_by_xla(scale, projected, cosines, sines)
    return _rotate_by_platform(scale, projected, cosines, sines)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)  # traced and lowered once for all layers
def _rotate_by_platform(scale, projected, cosines, sines):
    from kernels.rotation_cpu import rotate_on_cpu

    return lax.platform_dependent(
        projected,
        cosines,
        sines,
        cpu=functools.partial(rotate_on_cpu, scale=scale),
        default=functools.partial(_rotate_by_xla, scale),
    )


@_rotate_by_platform.defjvp
def _rotate_tangent(scale, primals, tangents):
    return jax.jvp(functools.partial(_rotate_by_xla, scale), primals, tangents)


def _rotate_by_xla(
    scale: float, projected: Array, cosines: Array, sines: Array
) -> tuple[Array, Array, Array]:
    group = projected.shape[-2] - 2
    queries, keys, values = jnp.split(projected, (group, group + 1), axis=-2)
    queries = scale * rotate(queries, cosines, sines)
    keys = rotate(keys, cosines, sines)
    # What is kept of a layer is computed at once. XLA would put it off until caches are written
    # at the end of a chunk, and hold on to every layer's whole product until then.
    kept = lax.optimization_barrier(jnp.concatenate([keys, values], axis=-2))
    keys, values = jnp.moveaxis(kept, -2, 0)
    return queries, jnp.swapaxes(keys, -3, -2), jnp.swapaxes(values, -3, -2)


def rotate(
    x: Float[Array, "*batch length kv_heads group head_dim"],
    cosines: Float[Array, "*batch length half"],
    sines: Float[Array, "*batch length half"],
) -> Float[Array, "*batch length kv_heads group head_dim"]:
    """Rotates channel i with channel i + half; channels past `2 * half` pass through."""
    half = cosines.shape[-1]
    cosines = cosines[..., None, None, :]
    sines = sines[..., None, None, :]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = (first * cosines - second * sines, second * cosines + first * sines, rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
