"""Where arrays live: logical axis names, and the one table from them to mesh axes.

Every parameter and every cache names its axes. A table of rules says which mesh axes each name
is split over; a name that is absent, or whose size the mesh axes do not divide, is replicated.
Networks in one program may be placed by different tables. The mesh has the axes
`(data, fsdp, model)`; without a mesh all of this is a no-op.

    RULES         searches and rewards: prompts over data and fsdp, networks over model
    TRAINING      fits: what is trained lies over fsdp as well, and is gathered layer by layer
    REPLICATED    a whole network on every device, beside others that are split
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")
PyTree: TypeAlias = Any
MeshAxes: TypeAlias = str | tuple[str, ...]
Rules: TypeAlias = FrozenDict[str, MeshAxes]
"""Hashable, so that a network may be static under `jax.jit` and know how it is placed."""

REPLICATED: Rules = FrozenDict({"batch": ("data", "fsdp")})
RULES: Rules = REPLICATED.copy({"kv_heads": "model", "mlp": "model", "vocab": "model"})
TRAINING: Rules = RULES.copy({"embed": "fsdp"})


def make_mesh(
    data: int = 1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    fsdp: int = 1,
) -> Mesh:
    """A `(data, fsdp, model)` mesh over the first `data * fsdp * model` devices.

    Raises:
      ValueError: there are fewer devices than that.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, model)
    size = math.prod(shape)
    if min(shape) < 1 or size > len(devices):
        raise ValueError(
            f"A mesh of data={data} x fsdp={fsdp} x model={model} needs {size} devices."
            f" Got: {len(devices)}"
        )
    return jax.make_mesh(
        shape, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3, devices=devices[:size]
    )


def mesh_axes(name: str | None, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> tuple[str, ...]:
    """The axes of `mesh`, of more than one device, that a logical axis is split over."""
    axes = rules.get(name, ()) if name is not None else ()
    axes = (axes,) if isinstance(axes, str) else axes
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def num_shards(name: str, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> int:
    """Into how many parts a logical axis is split, where they divide its size."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(name, mesh, rules))


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    rules: Rules = RULES,
) -> PartitionSpec:
    """How an array with logical `axes` and `shape` is split over `mesh`."""

    def split(name: str | None, size: int) -> MeshAxes | None:
        found = mesh_axes(name, mesh, rules)
        if not found or size % math.prod(mesh.shape[axis] for axis in found):
            return None
        return found if len(found) > 1 else found[0]

    return PartitionSpec(*(split(*pair) for pair in zip(axes, shape, strict=True)))


def named_sharding(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES
) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, rules))


def spread_batch(x: jax.Array) -> jax.Array:
    """Pins the leading axis to that of batches on the mesh of `jax.set_mesh`, if there is one.

    The other axes follow from how the weights are split, so that networks with other rules
    can share a program. Inside `jax.shard_map` the caller has placed everything already.
    """
    mesh = automatic_mesh()
    if mesh is None:
        return x
    spread, *_ = partition_spec(("batch",), x.shape[:1], mesh)
    if spread is None:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(spread, *rest))


def whole_rows(table: jax.Array) -> jax.Array:
    """A table whose rows are going to be looked up, on a mesh: no row is split.

    Otherwise XLA would replicate what was found on all devices.
    """
    if automatic_mesh() is None:
        return table
    return jax.lax.with_sharding_constraint(table, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


def automatic_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` if it has several devices and XLA places arrays on it.

    None inside `jax.shard_map`, whose caller has placed everything already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if mesh.size > 1 and automatic else None


def tree_specs(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> PyTree:
    """A `PartitionSpec` for every array of a tree, in its structure.

    Parameters that name their axes (`nnx.Variable`) follow the rules; anything else is replicated.
    """

    def place(node):
        if not isinstance(node, nnx.Variable):
            return PartitionSpec()
        value = node.get_value()
        axes = node.get_metadata().get("axes", (None,) * value.ndim)
        return node.replace(partition_spec(axes, value.shape, mesh, rules))

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def tree_shardings(tree: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """As `tree_specs`, a `NamedSharding` each."""
    specs = tree_specs(tree, mesh, rules)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def pin(tree: PyTree, places: PyTree) -> PyTree:
    """Keeps arrays where they belong, in programs on a mesh.

    Args:
      tree: arrays.
      places: their `PartitionSpec`s, in the same structure.
    """
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, places)


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh of several devices that a tree's first array lies on; None if it does not."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh if sharding.mesh.size > 1 else None
        return None
    return None


@contextlib.contextmanager
def where(tree: PyTree) -> Iterator[None]:
    """In its body, programs run on the mesh that the arrays of a tree, such as weights, lie on."""
    mesh = mesh_of(tree)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def run_where(tree: PyTree, items: Iterator[T]) -> Iterator[T]:
    """The items of an iterator that runs programs, each made inside `where(tree)`."""
    while True:
        with where(tree):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
