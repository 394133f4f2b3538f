"""Value networks that remember tokens, and compute their keys and values anew at every chunk.

A value network keeps keys and values of every prompt, beam and candidate, and T LoRA adapters keep
T times as many. Where memory is short, they need not: what is kept here is the tokens, and each
chunk is scored prompt by prompt and adapter by adapter, with the cache of one prompt, which is then
dropped. The prompt and its K beams are read again at every chunk, in exchange.

Letters: P prompts, S prompt slots, K beams, H beam slots, B successors, N new tokens, T value
functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models import Network
from iro_jax.models.cache import EMPTY, Cache, CachePart, pack
from iro_jax.models.network import Want, token_positions
from iro_jax.values.network import ValueMemory, ValueNetwork, ValueParams
from iro_jax.values.stacked import StackedMemory, StackedNetworks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMemory:
    """What a recomputed network remembers during a search.

    Attributes:
      tokens: a cache of one layer whose "keys" are the tokens' ids, of one head of size one;
        beams fork, grow and forget as in any other.
      kept: how many of its beam's tokens each candidate has; None for all, and after a commit.
    """

    tokens: Cache
    kept: Int[Array, "P K B"] | None = None

    def commit(self, parents: Int[Array, "P K"]) -> TokenMemory:
        return TokenMemory(self.tokens.commit(parents, self.kept))

    def admit(self, rows: Int[Array, " A"], newcomers: TokenMemory) -> TokenMemory:
        return TokenMemory(self.tokens.admit(rows, newcomers.tokens))


@dataclasses.dataclass(frozen=True)
class RecomputedNetwork:
    """A `ValueNetwork` without keys and values of its own; takes its place, with its parameters.

    It reads one prompt at a time, and so leaves a mesh's axis of prompts idle.

    Attributes:
      each: the network.
    """

    each: ValueNetwork

    @property
    def network(self) -> Network:
        return self.each.network

    @property
    def num_values(self) -> int:
        return self.each.num_values

    def prefill(
        self,
        params: ValueParams,
        tokens: Int[Array, "P S"],
        mask: Bool[Array, "P S"],
        *,
        beam_width: int,
        beam_slots: int,
        num_successors: int,
        chunk_length: int,
    ) -> tuple[Float[Array, "P T"], TokenMemory]:
        """As `ValueNetwork.prefill`."""

        def of_prompt(network: ValueNetwork, params: ValueParams, arrays: Any) -> Array:
            tokens, mask = arrays
            values, _ = network.prefill(params, tokens[None], mask[None])
            return values[0]

        values = self._by_prompt(of_prompt, params, (tokens, mask))
        num_prompts, prompt_slots = tokens.shape
        memory = Cache(
            prompt=_empty((num_prompts,), prompt_slots),
            beams=_empty((num_prompts, beam_width), beam_slots),
            chunk=_empty((num_prompts, beam_width, num_successors), chunk_length),
        )
        start = jnp.zeros(num_prompts, jnp.int32)
        prompt = _write(memory.prompt, tokens, token_positions(mask, start))
        return values, TokenMemory(dataclasses.replace(memory, prompt=prompt))

    def extend(
        self,
        params: ValueParams,
        memory: TokenMemory,
        tokens: Int[Array, "P K B N"],
        mask: Bool[Array, "P K B N"],
        kept: Int[Array, "P K B"] | None = None,
    ) -> tuple[Float[Array, "P K B T"], TokenMemory]:
        """As `ValueNetwork.extend`."""
        cache = memory.tokens

        def of_prompt(network: ValueNetwork, params: ValueParams, arrays: Any) -> Array:
            prompt, beams, cursor, new = jax.tree.map(lambda x: x[None], arrays)
            own = _read(network, params, prompt, beams, cursor, tokens.shape[2], tokens.shape[3])
            values, _ = network.extend(params, own, *new)
            return values[0]

        before = (_tokens(cache.prompt), _tokens(cache.beams), cache.beams.cursor)
        values = self._by_prompt(of_prompt, params, (*before, (tokens, mask, kept)))
        start = cache.beams.lengths[..., None] if kept is None else kept
        positions = token_positions(mask, cache.prompt.lengths[:, None, None] + start)
        chunk = _write(cache.chunk, tokens, positions)
        return values, TokenMemory(dataclasses.replace(cache, chunk=chunk), kept)

    def _by_prompt(
        self,
        of_prompt: Callable[[ValueNetwork, ValueParams, Any], Float[Array, "*lead T"]],
        params: ValueParams,
        arrays: Any,
    ) -> Float[Array, "P *lead T"]:
        """Calls a function prompt by prompt, and adapter by adapter."""

        def of_network(network: ValueNetwork, params: ValueParams) -> Array:
            return lax.map(lambda of_one: of_prompt(network, params, of_one), arrays)

        if not self.each.adapters:
            return of_network(self.each, params)

        def of_adapter(own: Any) -> Array:
            head, adapters = jax.tree.map(lambda x: x[None], own)
            network = dataclasses.replace(self.each, num_values=1)
            return of_network(network, ValueParams(params.backbone, head, adapters))[..., 0]

        return jnp.moveaxis(lax.map(of_adapter, (params.head, params.adapters)), 0, -1)


AnyNetwork: TypeAlias = ValueNetwork | StackedNetworks | RecomputedNetwork
AnyMemory: TypeAlias = ValueMemory | StackedMemory | TokenMemory


def _read(
    value: ValueNetwork,
    params: ValueParams,
    prompt: tuple[Int[Array, "1 S"], Bool[Array, "1 S"]],
    beams: tuple[Int[Array, "1 K H"], Bool[Array, "1 K H"]],
    cursor: Int[Array, " 1"],
    successors: int,
    length: int,
) -> ValueMemory:
    """One prompt and its beams, and room for chunks of so many successors and tokens."""
    network, config = value.network, value.network.config
    tokens, mask = (x[:, :, None] for x in beams)
    width, slots = tokens.shape[1], tokens.shape[-1]
    cache = network.empty_cache(
        num_prompts=1, prompt_slots=prompt[0].shape[-1], beam_width=width, chunk_length=slots
    )
    want: tuple[Want, ...] = ("hidden",)  # of which nothing is used, or computed
    _, cache = network.prefill(params.backbone, cache, *prompt, want=want, adapters=params.adapters)
    if slots:
        _, cache = network.decode(
            params.backbone,
            cache,
            tokens,
            mask,
            want=want,
            adapters=params.adapters,
            at=jnp.zeros((1, width, 1), jnp.int32),
        )
    return ValueMemory(
        Cache(
            prompt=cache.prompt,
            beams=dataclasses.replace(cache.chunk.of_one_candidate(), cursor=cursor),
            chunk=CachePart.empty(config, (1, width, successors), length),
        )
    )


def _empty(lead: tuple[int, ...], slots: int) -> CachePart:
    return CachePart(
        keys=(pack(jnp.zeros((*lead, 1, slots, 1), jnp.int32)),),
        values=(),
        positions=jnp.full((*lead, slots), EMPTY, jnp.int32),
        lengths=jnp.zeros(lead, jnp.int32),
        cursor=jnp.zeros(lead[:1] if len(lead) == 2 else (), jnp.int32),
    )


def _tokens(part: CachePart) -> tuple[Int[Array, "*lead slots"], Bool[Array, "*lead slots"]]:
    """The ids in a part's slots, and which of them are there."""
    return part.keys[0].reshape(part.positions.shape), part.positions != EMPTY


def _write(
    part: CachePart, tokens: Int[Array, "*lead N"], positions: Int[Array, "*lead N"]
) -> CachePart:
    """An empty part with tokens in its first slots."""
    new = tokens.astype(jnp.int32)[..., None, :, None]
    return CachePart(
        keys=(lax.dynamic_update_slice_in_dim(part.keys[0], pack(new), 0, axis=-2),),
        values=(),
        positions=lax.dynamic_update_slice_in_dim(part.positions, positions, 0, axis=-1),
        lengths=jnp.sum(positions != EMPTY, axis=-1, dtype=jnp.int32),
        cursor=jnp.full_like(part.cursor, tokens.shape[-1]),
    )
