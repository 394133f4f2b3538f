"""Abstract arrays with shardings, and what they weigh on a device."""

from __future__ import annotations

import math
from typing import Any

import jax

PyTree = Any


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
