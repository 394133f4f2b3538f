"""Weights for decoding on a CPU: those that came quantised, as codes that kernels read.

Decoding a few tokens takes about as long as reading the weights, and weights that were quantised
once take few values, whatever they are stored as. Coded, they are a quarter or an eighth as many
bytes, and programs compute the same numbers from them (see `kernels.coded`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from flax import nnx

from iro_jax.models.network import Params

if TYPE_CHECKING:
    from kernels import Coded

T = TypeVar("T")
_INPUTS_FIRST = ("qkv", "up")
_TABLES = ("embedding", "unembedding")

_known: dict[int, Coded | None] = {}
"""What was found for arrays, by their identity, for as long as they live."""


def code_weights(tree: T) -> T:
    """The same tree for programs to run with, weights of its networks coded where they can be.

    `Guide` and `Sampler` do this themselves. Weights are coded that lie on one CPU device in f32
    and in blocks of the formats that GGUF calls Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0; it is tried, and
    kept if every number comes out to the last bit. Anything else stays as it is, as does everything
    on other platforms or without a C++ compiler. Trees with coded weights are for `prefill`,
    `decode` and `forward`; to train, merge, split or save weights, use the original.

    Args:
      tree: anything with networks' parameters (`nnx.State`) in it.

    Returns:
      A tree whose coded weights live beside the original ones, and as long as these; calls with the
      same arrays share them.
    """
    from kernels import native  # Pallas, beside it, takes a third of a second to import

    if not native.takes():
        return tree

    def code(node: Any) -> Any:
        return _of_network(node) if isinstance(node, nnx.State) else node

    return jax.tree.map(code, tree, is_leaf=lambda node: isinstance(node, nnx.State))


def _of_network(params: Params) -> Params:
    flat = dict(nnx.to_flat_state(params))
    table = flat["embedding",].get_value()
    if not _at_hand(table) or table.ndim != 2:  # coded before, or networks in a stack
        return params
    width = table.shape[1]
    for path, variable in flat.items():
        weights = variable.get_value()
        if not _at_hand(weights):
            continue
        if path[-1] in _TABLES:
            found = _coded(weights, lambda table: table.T)
        elif path[-1] == "kernel" and path[-2] in _INPUTS_FIRST:
            found = _coded(weights, lambda kernel: kernel.reshape(width, -1))
        elif path[-1] == "kernel":
            found = _coded(weights, lambda kernel: kernel.reshape(-1, width))
        else:
            continue
        if found is not None:
            flat[path] = variable.replace(found)
    return nnx.from_flat_state(flat)


def _at_hand(weights: Any) -> bool:
    """Whether it is an array, not a tracer or a shape, on one CPU device."""
    if not isinstance(weights, jax.Array) or isinstance(weights, jax.core.Tracer):
        return False
    return [device.platform for device in weights.devices()] == ["cpu"]


def _coded(weights: jax.Array, as_matrix: Callable[[jax.Array], jax.Array]) -> Coded | None:
    from kernels import encode

    key = id(weights)
    if key not in _known:
        _known[key] = encode(as_matrix(weights))
        weakref.finalize(weights, _known.pop, key, None).atexit = False
    return _known[key]
