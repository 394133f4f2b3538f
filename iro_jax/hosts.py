"""Several hosts that run the same command together, by `jax.distributed`.

Each has a part of the devices. A copy of a network lies on the devices of one host, so that hosts
search, score and read by themselves (`local_mesh`); only a fit is one program over all of them.
What all hosts compute alike, the first one writes, into a folder that all of them can see.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from iro_jax.models import make_mesh


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other hosts; to be called before anything else asks JAX for devices.

    Args:
      coordinator: address and port of the first host; with the other two None where JAX finds the
        hosts by itself, as on TPU pods, with Slurm, MPI or Kubernetes.
      num_processes: how many hosts there are.
      process_id: the number of this one.

    Raises:
      ValueError: JAX does not find the hosts, or they do not meet.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "The hosts did not meet. Outside of TPU pods, Slurm, MPI and Kubernetes each has to say"
            " coordinator (ADDRESS:PORT), num_processes and process_id."
            f" Got: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def leaving_at_errors() -> Iterator[None]:
    """Where there are others, an error in the body ends this process at once.

    An ordinary end would wait for the others, which wait for this one; so they are told that it is
    gone, and end as well.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1:
            raise
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def count() -> int:
    """How many hosts there are."""
    return jax.process_count()


def index() -> int:
    """Which one this is."""
    return jax.process_index()


def first() -> bool:
    """Whether this is the one that writes what all of them compute alike."""
    return index() == 0


def meet(place: str) -> None:
    """Waits until all hosts are here. `place` is a name that must be the same on all."""
    if count() > 1:
        multihost_utils.sync_global_devices(place)


def global_mesh(data: int = -1, fsdp: int = 1, model: int = 1) -> Mesh | None:
    """The mesh over the devices of all hosts, or None if there is only one device.

    Args:
      data: -1 for what the others leave.
      fsdp, model: see `iro_jax.models.sharding`.

    Raises:
      ValueError: the axes do not make up the devices, or `model` crosses from host to host.
    """
    devices = jax.device_count()
    if min(fsdp, model) < 1 or (data < 1 and data != -1):
        raise ValueError(
            "The axes of a mesh must be at least 1 (data may be -1)."
            f" Got: data={data}, fsdp={fsdp}, model={model}"
        )
    if data == -1:
        data = max(devices // (fsdp * model), 1)
    size = math.prod((data, fsdp, model))
    if count() == 1:
        mesh = make_mesh(data, model, fsdp=fsdp)
        return mesh if mesh.size > 1 else None
    if size != devices or jax.local_device_count() % model:
        raise ValueError(
            f"A mesh over {count()} hosts takes all of their {devices} devices, and a network lies"
            f" on one host: model must divide {jax.local_device_count()}."
            f" Got: data={data}, fsdp={fsdp}, model={model}"
        )
    return mesh_by_host(jax.devices(), data, fsdp, model)


def local_mesh(mesh: Mesh | None) -> Mesh | None:
    """The part of `global_mesh` that lies on this host's devices; None if that is one device."""
    if mesh is None or count() == 1:
        return mesh
    own = part_of_host(mesh, index())
    return own if own.size > 1 else None


def mesh_by_host(devices: Sequence[jax.Device], data: int, fsdp: int, model: int) -> Mesh:
    """A mesh over all of these, host after host: each has whole copies of a network."""
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(
        np.asarray(ordered).reshape(data, fsdp, model),
        ("data", "fsdp", "model"),
        axis_types=(AxisType.Auto,) * 3,
    )


def part_of_host(mesh: Mesh, host: int) -> Mesh:
    """What of a `mesh_by_host` lies on one host: `data` takes what `model` leaves."""
    rows = mesh.devices.reshape(-1, mesh.shape["model"])
    own = rows[[row[0].process_index == host for row in rows]]
    return Mesh(own[:, None, :], mesh.axis_names, axis_types=mesh.axis_types)
