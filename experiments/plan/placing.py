"""Abstract arrays with shardings: parameters where a run puts them, and what they weigh there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.plan.experiment import Experiment
from iro_jax.models.sharding import Rules

PyTree = Any


def place_weights(params: PyTree, network: Any, mesh: Mesh, rules: Rules) -> PyTree:
    return with_shardings(params, network.param_shardings(mesh, rules))


def place_scorer(experiment: Experiment, params: PyTree, mesh: Mesh) -> PyTree:
    """A scorer's parameters: networks by their rules, heads and adapters on every device."""
    replicated = NamedSharding(mesh, PartitionSpec())
    everywhere = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), params
    )
    if experiment.on_policy:
        return everywhere
    network = experiment.value.network
    networks = tuple(
        dataclasses.replace(
            of_one,
            backbone=place_weights(of_one.backbone, network, mesh, experiment.value_rules),
        )
        for of_one in everywhere.networks
    )
    return dataclasses.replace(everywhere, networks=networks)


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def device_bytes(tree: PyTree) -> int:
    """Of placed abstract arrays on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
