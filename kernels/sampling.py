"""Temperature, top-k, top-p and the Gumbel-max draw in one kernel, without a sort.

Noise belongs to a key and a token id: the draw is that of `iro_jax.models.sampling.draw`, up to
the rounding of sums, wherever the logits lie. Over the shards of a mesh axis, no device holds
all logits.

Letters: R rows, V vocabulary size (of a shard, where there are shards).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from kernels.dispatch import Implementation, dispatch
from kernels.sampling_algorithm import Drawn, Warpers
from kernels.sampling_gpu import gpu_kernel
from kernels.sampling_tpu import sharded_tpu_kernel, tpu_kernel
from kernels.sampling_xla import reference


def fused_draw(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    axis_name: str | None = None,
    implementation: Implementation = "auto",
) -> Drawn:
    """Draws one token per row; the warpers mean what they do in `iro_jax.models.Sampling`.

    Args:
      key_data: `jax.random.key_data` of one threefry key per row.
      logits: of the policy, f32, without NaN.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keeps the k most likely tokens (ties towards the lower id); None keeps all.
      top_p: then keeps the most likely tokens whose predecessors' mass is below top_p.
      axis_name: inside `jax.shard_map`, the mesh axis that the vocabulary is split over:
        device i of it holds ids `[i * V, (i + 1) * V)`. All of them get the same draw.
      implementation: see `kernels.Implementation`. On GPU, shards are drawn by XLA.

    Raises:
      ValueError: shapes, types or warpers are not as described.
    """
    _check(key_data, logits, temperature, top_k, top_p)
    warpers = Warpers(temperature, top_k, top_p)
    if axis_name is None:
        xla = functools.partial(reference, warpers=warpers)
        tpu, gpu = (
            functools.partial(kernel, warpers=warpers) for kernel in (tpu_kernel, gpu_kernel)
        )
        interpret = functools.partial(tpu, interpret=True)
    else:
        xla = gpu = functools.partial(reference, warpers=warpers, axis_name=axis_name)
        tpu = functools.partial(sharded_tpu_kernel, warpers=warpers, axis_name=axis_name)
        interpret = functools.partial(tpu, interpret=True)
    return dispatch(
        implementation, key_data, logits, xla=xla, tpu=tpu, gpu=gpu, interpret=interpret
    )


def _check(key_data, logits, temperature, top_k, top_p):
    """Raises a ValueError for arguments that do not fit."""
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise ValueError(f"logits must be f32 [R, V]. Got: {logits.dtype} {logits.shape}")
    if key_data.shape != (logits.shape[0], 2) or key_data.dtype != jnp.uint32:
        raise ValueError(
            f"key_data must be uint32 {(logits.shape[0], 2)}, of threefry keys."
            f" Got: {key_data.dtype} {key_data.shape}"
        )
    if temperature != 0 and not 1e-4 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be 0 (greedy) or finite and at least 1e-4. Got: {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be None or at least 1. Got: {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]. Got: {top_p}")
