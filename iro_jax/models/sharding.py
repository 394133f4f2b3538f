"""Where arrays live: logical axis names, and the one table from them to mesh axes.

Every parameter and every cache names its axes. `RULES` says which mesh axis each name is
split over; a name that is absent, or whose size the mesh axis does not divide, is
replicated. The mesh has the axes `(data, model)`; without a mesh all of this is a no-op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str]

RULES: Rules = {
    "batch": "data",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
}


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A `(data, model)` mesh over the first `data * model` devices.

    Raises:
      ValueError: there are fewer devices than that.
    """
    devices = jax.devices() if devices is None else devices
    if data < 1 or model < 1 or data * model > len(devices):
        raise ValueError(
            f"A mesh of data={data} x model={model} needs {data * model} devices."
            f" Got: {len(devices)}"
        )
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: data * model],
    )


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | jax.sharding.AbstractMesh,
    rules: Rules = RULES,
) -> PartitionSpec:
    """How an array with logical `axes` and `shape` is split over `mesh`."""

    def mesh_axis(axis: str | None, size: int) -> str | None:
        name = rules.get(axis) if axis is not None else None
        divisible = name in mesh.shape and size % mesh.shape[name] == 0
        return name if divisible else None

    return PartitionSpec(*(mesh_axis(*pair) for pair in zip(axes, shape, strict=True)))


def named_sharding(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES
) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes, shape, mesh, rules))


def spread_batch(x: jax.Array) -> jax.Array:
    """Pins the leading axis to `data` on the mesh of `jax.set_mesh`, if there is one.

    The other axes follow from how the weights are split, so that networks with other rules
    can share a program. Inside `jax.shard_map` the caller has placed everything already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]
    axis = RULES["batch"]
    if axis not in automatic or x.shape[0] % mesh.shape[axis]:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axis, *rest))
