"""Meshes over devices that need not be there, and abstract arrays on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from experiments.plan.chips import Topology
from iro_jax import hosts
from iro_jax.models.sharding import make_mesh

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a run's programs lie; see `iro_jax.hosts`.

    Attributes:
      mesh: over all devices, for fits.
      own: over those of one host, for everything else: hosts search by themselves.
      num_hosts: how many there are.
    """

    mesh: Mesh
    own: Mesh
    num_hosts: int

    @property
    def shares(self) -> int:
        """Groups of a host's devices that have prompts of their own."""
        return self.own.shape["data"] * self.own.shape["fsdp"]


def places_of(topology: Topology, mesh: Mapping[str, int]) -> Places:
    """The meshes of a run on a topology. Those of GPUs serve for shapes and shardings alone.

    Raises:
      ValueError: the axes do not take all devices, or `model` does not divide those of a host.
    """
    sizes = mesh_sizes(topology.num_devices, mesh)
    if topology.host_devices % sizes["model"]:
        raise ValueError(
            f"A network lies on one host, and {topology.name} has {topology.host_devices} devices"
            f" on each: model must divide them. Got: {sizes['model']}"
        )
    num_hosts = topology.num_devices // topology.host_devices
    if topology.is_tpu:
        devices = tpu_devices(topology.name)
        if num_hosts == 1:
            own = mesh_of(devices, sizes)
            return Places(own, own, 1)
        everywhere = hosts.mesh_by_host(devices, **sizes)
        own = hosts.part_of_host(everywhere, devices[0].process_index)
        return Places(everywhere, own, num_hosts)
    everywhere = _abstract(sizes)
    if num_hosts == 1:
        return Places(everywhere, everywhere, 1)
    shares = topology.host_devices // sizes["model"]
    of_host = _abstract({"data": shares, "fsdp": 1, "model": sizes["model"]})
    return Places(everywhere, of_host, num_hosts)


def tpu_devices(topology: str) -> Sequence[jax.Device]:
    """Of a TPU slice, host by host; libtpu knows them."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return sorted(found.devices, key=lambda device: (device.process_index, device.id))


def mesh_of(devices: Sequence[jax.Device], mesh: Mapping[str, int]) -> Mesh:
    """A mesh over all of some devices; `data` of -1 is what the other axes leave.

    Raises:
      ValueError: the axes do not take all of them.
    """
    sizes = mesh_sizes(len(devices), mesh)
    return make_mesh(sizes["data"], sizes["model"], devices, fsdp=sizes["fsdp"])


def mesh_sizes(num_devices: int, mesh: Mapping[str, int]) -> dict[str, int]:
    """The axes' sizes on so many devices.

    >>> mesh_sizes(16, {"data": -1, "fsdp": 1, "model": 4})
    {'data': 4, 'fsdp': 1, 'model': 4}
    """
    rest = mesh["fsdp"] * mesh["model"]
    sizes = dict(mesh) | ({"data": num_devices // rest} if mesh["data"] == -1 else {})
    if sizes["data"] * rest != num_devices:
        raise ValueError(f"The mesh must take all {num_devices} devices. Got: {dict(mesh)}")
    return sizes


def _abstract(sizes: Mapping[str, int]) -> Mesh:
    kinds = (AxisType.Auto,) * len(sizes)
    return cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds))


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """Abstract arrays where they are going to lie."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def device_bytes(tree: PyTree) -> int:
    """Of placed abstract arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
