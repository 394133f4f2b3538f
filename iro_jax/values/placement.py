"""Where a fit's arrays lie: on one device, or on a mesh over the devices of all hosts.

Parameters, what belongs to them (gradients, the optimizer's moments), and frozen weights go by
`iro_jax.models.sharding.TRAINING`; batches are spread over the axes of batches. Every host has the
whole batch in its memory and puts the rows of its own devices on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from iro_jax.models.sharding import (
    TRAINING,
    automatic_mesh,
    named_sharding,
    pin,
    tree_shardings,
    tree_specs,
)

PyTree: TypeAlias = Any


class Placement:
    """Puts arrays on a mesh and takes them back.

    Args:
      mesh: None for one device, where all of this does nothing.
    """

    def __init__(self, mesh: Mesh | None):
        self.mesh = mesh if mesh is not None and mesh.size > 1 else None

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """In its body, programs run on the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def put(self, tree: PyTree) -> PyTree:
        """Parameters; see `iro_jax.models.sharding.tree_shardings`."""
        if self.mesh is None or tree is None:
            return tree
        return jax.tree.map(move, tree, tree_shardings(tree, self.mesh, TRAINING))

    def init(self, function: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
        """What `function`, such as an optimizer's, makes for parameters: beside these."""
        if self.mesh is None:
            return function(params)
        made = jax.eval_shape(function, params)
        with jax.set_mesh(self.mesh):
            places = tree_shardings(made, self.mesh, TRAINING)
            return jax.jit(function, out_shardings=places)(params)

    def spread(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        """A batch; arrays whose rows the devices cannot share go to all of them."""
        if self.mesh is None:
            return batch

        def on_mesh(x: np.ndarray) -> jax.Array:
            assert self.mesh is not None
            names = ("batch", *(None,) * (x.ndim - 1))[: x.ndim]
            return move(x, named_sharding(names, x.shape, self.mesh))

        return {name: on_mesh(np.asarray(x)) for name, x in batch.items()}

    def fetch(self, tree: PyTree, homes: PyTree) -> PyTree:
        """Parameters back where they came from.

        Args:
          homes: `home` of each of them, in the same structure.
        """
        if self.mesh is None:
            return tree
        return jax.tree.map(bring_home, tree, homes)


def keep_placed(tree: PyTree) -> PyTree:
    """Inside a program: what a fit carries from update to update stays where it belongs."""
    mesh = automatic_mesh()
    if mesh is None:
        return tree
    return pin(tree, tree_specs(tree, mesh, TRAINING))


def move(x: Any, place: NamedSharding) -> jax.Array:
    """An array that this host has all of, on a mesh of which it may have a part."""
    if place.is_fully_addressable:
        return jax.device_put(x, place)
    return jax.make_array_from_callback(x.shape, place, lambda index: np.asarray(x[index]))


def home(x: Any) -> Sharding:
    """Where an array that is going to be moved comes from."""
    found = getattr(x, "sharding", None)
    return found or SingleDeviceSharding(jax.local_devices()[0])


def bring_home(x: jax.Array, place: Sharding) -> jax.Array:
    """The inverse of `move`: all of an array, on this host's own devices.

    Args:
      place: `home` of the array that was moved. One without a mesh comes back uncommitted, so that
        programs on any mesh can use it.
    """
    on_mesh = isinstance(place, NamedSharding)
    if not x.is_fully_addressable:
        assert isinstance(x.sharding, NamedSharding)
        spec = place.spec if isinstance(place, NamedSharding) else PartitionSpec()
        gathered = NamedSharding(x.sharding.mesh, spec)
        x = jax.jit(lambda y: y, out_shardings=gathered)(x)
    if not on_mesh:
        return jnp.asarray(np.asarray(x))
    if x.is_fully_addressable:
        return jax.device_put(x, place)
    own = {shard.device: shard.data for shard in x.addressable_shards}
    devices = place.addressable_devices_indices_map(x.shape)
    return jax.make_array_from_single_device_arrays(
        x.shape, place, [own[device] for device in devices]
    )
