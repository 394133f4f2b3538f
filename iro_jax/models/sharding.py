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

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...]
Rules = Mapping[str, MeshAxes]

REPLICATED: Rules = {"batch": ("data", "fsdp")}
RULES: Rules = {**REPLICATED, "kv_heads": "model", "mlp": "model", "vocab": "model"}
TRAINING: Rules = {**RULES, "embed": "fsdp"}


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


def automatic_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` if it has several devices and XLA places arrays on it.

    None inside `jax.shard_map`, whose caller has placed everything already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if mesh.size > 1 and automatic else None
