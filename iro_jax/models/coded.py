"""Weights for decoding on a CPU: those that came quantised, as codes that kernels read.

Decoding a few tokens takes about as long as reading the weights, and weights that were quantised
once take few values, whatever they are stored as. Coded, they are three or five sixteenths of the
bytes of f32, and programs compute the same numbers from them (see `kernels.coded`).
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from iro_jax.models.network import Params

if TYPE_CHECKING:
    from kernels import Coded

T = TypeVar("T")
_OF_EVERY_NETWORK = {("embedding",), ("layers", 0, "attention", "qkv", "kernel")}

_known: dict[int, Coded | None] = {}
"""What was found for arrays, by their identity, for as long as they live."""


def code_weights(tree: T) -> T:
    """The same tree for programs to run with, weights of its networks coded where they can be.

    `Guide`, `ApiGuide` and `Sampler` do this themselves. Matrices are coded that lie on one CPU
    device in f32, and all of whose numbers are what files of GGUF's types Q4_0, Q4_1, Q5_0, Q5_1
    and Q8_0 hold, as their plain quantisers choose slopes: it is tried, and kept if every number
    comes out the same. Anything else stays as it is, as does everything on other platforms or
    without a C++ compiler. Trees with coded weights are for `prefill`, `decode` and `forward`
    outside of meshes; to train, merge, split or save weights, use the original.

    Args:
      tree: anything with networks' parameters in it.

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
    if not flat.keys() >= _OF_EVERY_NETWORK:  # somebody's own module
        return params
    table = flat["embedding",].get_value()
    if not _at_hand(table) or table.ndim != 2:  # on a mesh, coded before, or networks in a stack
        return params
    # Tokens alone are looked up in it then; nothing is multiplied with it.
    untied = ("unembedding",) in flat or ("score_head",) in flat
    for path, variable in flat.items():
        if untied and path == ("embedding",):
            continue
        found = _coded(path, variable.get_value(), table.shape[1])
        if found is not None:
            flat[path] = variable.replace(found)
    return nnx.from_flat_state(flat)


def _at_hand(weights: Any) -> bool:
    """Whether it is an array in f32, not a tracer or a shape, on one CPU device."""
    if not isinstance(weights, jax.Array) or isinstance(weights, jax.core.Tracer):
        return False
    on = [device.platform for device in weights.devices()]
    return on == ["cpu"] and weights.dtype == jnp.float32


def _coded(path: tuple[str | int, ...], weights: Any, width: int) -> Coded | None:
    if not _at_hand(weights):
        return None
    key = id(weights)
    if key not in _known:
        with jax.ensure_compile_time_eval():  # a program that is traced may close over weights
            _known[key] = _encoded(path, weights, width)
        weakref.finalize(weights, _known.pop, key, None).atexit = False
    return _known[key]


def _encoded(path: tuple[str | int, ...], weights: jax.Array, width: int) -> Coded | None:
    """Weights of a product; None of anything else."""
    from kernels import encode

    match path:
        case ("embedding" | "unembedding",):
            return encode(weights, transposed=True)
        case ("layers", _, "attention" | "mlp", "qkv" | "up", "kernel"):
            return encode(weights.reshape(width, -1))
        case ("layers", _, "attention" | "mlp", "output" | "down", "kernel"):
            return encode(weights.reshape(-1, width))
    return None
