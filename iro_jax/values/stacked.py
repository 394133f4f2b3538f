"""Separate value networks of one architecture, read in one batched program.

Their parameters lie stacked along a leading axis, and every product with a weight becomes one
batched product for all of them. This costs a copy of the parameters: whoever has made a stack can
let the originals go, and should where memory is short. Networks that share a backbone need
none of this; see `iro_jax.values.network`.

Letters: N networks, T value functions each; P prompts, K beams, B successors, L new tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models import Network
from iro_jax.models.cache import Cache, CachePart
from iro_jax.values.network import ValueMemory, ValueNetwork, ValueParams

STACK_LIMIT = 4 * 2**30
"""The largest stack, in bytes, that is made without being asked for. The products of larger
networks fill an accelerator one by one, and a second copy of them might not fit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedMemory:
    """What stacked networks remember during a search.

    Attributes:
      of_each: keys and values with a leading axis of N. Positions, lengths and cursors are the
        same for all networks, and are held once: a cursor for each would turn writes into
        scatters, and loops over used slots into loops over all of them.
    """

    of_each: ValueMemory

    def commit(self, parents: Int[Array, "P K"]) -> StackedMemory:
        commit = jax.vmap(ValueMemory.commit, in_axes=(_MEMORY, None), out_axes=_MEMORY)
        return StackedMemory(commit(self.of_each, parents))

    def admit(self, rows: Int[Array, " A"], newcomers: StackedMemory) -> StackedMemory:
        axes = (_MEMORY, None, _MEMORY)
        admit = jax.vmap(ValueMemory.admit, in_axes=axes, out_axes=_MEMORY)
        return StackedMemory(admit(self.of_each, rows, newcomers.of_each))


@dataclasses.dataclass(frozen=True)
class StackedNetworks:
    """N equal `ValueNetwork`s with parameters of their own; takes the place of one of N * T.

    Attributes:
      each: the architecture of every one of them.
      num_networks: N.
    """

    each: ValueNetwork
    num_networks: int

    @property
    def network(self) -> Network:
        return self.each.network

    @property
    def num_values(self) -> int:
        """N * T; network by network."""
        return self.num_networks * self.each.num_values

    def prefill(
        self,
        params: ValueParams,
        tokens: Int[Array, "P S"],
        mask: Bool[Array, "P S"],
        **sizes: int,
    ) -> tuple[Float[Array, "P NT"], StackedMemory]:
        """As `ValueNetwork.prefill`; `params` have a leading axis of N."""

        def of_one(params: ValueParams) -> tuple[Array, ValueMemory]:
            return self.each.prefill(params, tokens, mask, **sizes)

        values, memory = jax.vmap(of_one, out_axes=(-2, _MEMORY))(params)
        return self._flat(values), StackedMemory(memory)

    def extend(
        self,
        params: ValueParams,
        memory: StackedMemory,
        tokens: Int[Array, "P K B L"],
        mask: Bool[Array, "P K B L"],
        kept: Int[Array, "P K B"] | None = None,
    ) -> tuple[Float[Array, "P K B NT"], StackedMemory]:
        """As `ValueNetwork.extend`; `params` have a leading axis of N."""

        def of_one(params: ValueParams, memory: ValueMemory) -> tuple[Array, ValueMemory]:
            return self.each.extend(params, memory, tokens, mask, kept)

        extend = jax.vmap(of_one, in_axes=(0, _MEMORY), out_axes=(-2, _MEMORY))
        values, extended = extend(params, memory.of_each)
        return self._flat(values), StackedMemory(extended)

    @staticmethod
    def _flat(values: Float[Array, "*lead N T"]) -> Float[Array, "*lead NT"]:
        return values.reshape(*values.shape[:-2], -1)


def stack_networks(
    networks: Sequence[tuple[ValueNetwork, ValueParams]], stacked: bool | None = None
) -> list[tuple[ValueNetwork | StackedNetworks, ValueParams]]:
    """Puts neighbours of one architecture together.

    Args:
      networks: with their parameters, in the order of their values.
      stacked: whether to; by default on accelerators, for stacks of up to `STACK_LIMIT` bytes.

    Returns:
      The networks and their parameters, of as many values in the same order. What stands alone,
      or has parameters of other shapes or types than its neighbours, is returned as it is.
    """
    if stacked is False or (stacked is None and jax.default_backend() == "cpu"):
        return list(networks)
    found: list[tuple[ValueNetwork | StackedNetworks, ValueParams]] = []
    for _, neighbours in itertools.groupby(networks, key=_architecture):
        group = list(neighbours)
        size = sum(leaf.nbytes for _, params in group for leaf in jax.tree.leaves(params))
        if len(group) == 1 or (stacked is None and size > STACK_LIMIT):
            found += group
            continue
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for _, params in group))
        found.append((StackedNetworks(group[0][0], len(group)), params))
    return found


def _architecture(pair: tuple[ValueNetwork, ValueParams]) -> object:
    network, params = pair
    leaves, structure = jax.tree.flatten(params)
    return network, structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


# Where the networks' axis lies; None where there is none.
_OF_PART: Any = (0, 0, None, None, None)
_PART = CachePart(*_OF_PART)
_MEMORY = ValueMemory(Cache(_PART, _PART, _PART))
