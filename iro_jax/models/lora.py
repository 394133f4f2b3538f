"""Low-rank adapters: several fine-tuned copies of one network in a single pass.

T adapters share a backbone. A batch that holds the same sequences T times, adapter by adapter,
goes through the layers once: every weight is read once for all T, and each T-th of the rows
gets its own adapter's `x @ down @ up` on top. Adapters of one copy are ordinary LoRA
(arXiv 2106.09685) with its factor alpha / r multiplied into `up`.

Letters: T adapters, r rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from iro_jax.models.config import TransformerConfig

Target = Literal["qkv", "output", "up", "down"]
"""The projections of a layer: fused query, key and value; attention output; fused gate and up;
down."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The change of one projection, for each of T copies of the network."""

    down: Float[Array, "T inputs r"]
    up: Float[Array, "T r outputs"]

    def change(self, rows: Float[Array, "rows inputs"]) -> Float[Array, "rows outputs"]:
        """What is added to the projection of `rows`, of which each T-th is one copy's."""
        copies = self.down.shape[0]
        x = rows.reshape(copies, rows.shape[0] // copies, rows.shape[-1])
        change = (x @ self.down.astype(x.dtype)) @ self.up.astype(x.dtype)
        return change.reshape(rows.shape[0], change.shape[-1])


_PLACES: dict[Target, tuple[str, str]] = {
    "qkv": ("attention", "qkv"),
    "output": ("attention", "output"),
    "up": ("mlp", "up"),
    "down": ("mlp", "down"),
}

Adapters: TypeAlias = tuple[dict[Target, Adapter], ...]
"""One dictionary a layer; projections that are not in it stay as they are."""


def init_adapters(
    config: TransformerConfig,
    key: Key[Array, ""],
    *,
    copies: int,
    rank: int,
    targets: Sequence[Target] = get_args(Target),
) -> Adapters:
    """Adapters that change nothing yet: `down` random, `up` zero.

    Raises:
      ValueError: a size is below one, or a target is unknown.
    """
    if copies < 1 or rank < 1:
        raise ValueError(f"copies and rank must be at least 1. Got: {copies}, {rank}")
    sizes = _sizes(config)
    if not targets or set(targets) - set(sizes):
        raise ValueError(f"targets must be some of {tuple(sizes)}. Got: {tuple(targets)}")

    def adapter(key: Array, target: Target) -> Adapter:
        inputs, outputs = sizes[target]
        down = jax.random.normal(key, (copies * inputs * rank,)) / math.sqrt(inputs)
        return Adapter(down.reshape(copies, inputs, rank), jnp.zeros((copies, rank, outputs)))

    keys = jax.random.split(key, (config.num_layers, len(targets)))
    return tuple(
        {target: adapter(keys[layer, i], target) for i, target in enumerate(targets)}
        for layer in range(config.num_layers)
    )


def merge_into(params: nnx.State, adapters: Adapters) -> nnx.State:
    """The weights with the changes of one copy's adapters in them, in the weights' types."""
    flat = dict(nnx.to_flat_state(params))
    for index, of_layer in enumerate(adapters):
        for target, adapter in of_layer.items():
            path = ("layers", index, *_PLACES[target], "kernel")
            kernel = flat[path].get_value()
            change = (adapter.down[0] @ adapter.up[0]).reshape(kernel.shape)
            flat[path] = flat[path].replace((kernel + change).astype(kernel.dtype))
    return nnx.from_flat_state(flat)


def _sizes(config: TransformerConfig) -> dict[Target, tuple[int, int]]:
    query_width = config.num_heads * config.head_dim
    kv_width = 2 * config.num_kv_heads * config.head_dim
    branches = 2 if config.gated_mlp else 1
    return {
        "qkv": (config.embed_dim, query_width + kv_width),
        "output": (query_width, config.embed_dim),
        "up": (config.embed_dim, branches * config.mlp_dim),
        "down": (config.mlp_dim, config.embed_dim),
    }
