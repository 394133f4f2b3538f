"""Key-value caches of a chunk-level search, in three parts.

Letters: P prompts, K beams, B successors a beam, S prompt slots, H beam slots, L chunk
slots, N new tokens.

    prompt   [P, S]         written once by prefill, shared by all candidates of the prompt
    beams    [P, K, H]      a beam's own tokens, shared by its successors
    chunk    [P, K, B, L]   the chunk in progress, one per candidate

A part is a set of slots. A slot holds the keys and values of one token in every layer, and
that token's position in its sequence; empty slots and padding have position -1:

    prompt.positions     0  1  2  3 -1 -1        a prompt of 4 tokens padded to 6
    beams.positions      4  5 -1 -1  6  7 -1     chunks of 4 slots; the first ended early
    chunk.positions      8  9 -1 -1              two tokens of the chunk are written

Keys and values are stored without their axes of size one (`pack` and `unpack`): XLA on CPU
cannot update an array in place that it also reads through a reshape, and it drops such axes by
one. Positions alone decide what is visible, so padding may stand anywhere and sliding windows
need no special case. Slots fill in step: `cursor`, the next free slot, is one number for
all sequences of a part, or of a prompt's beams. Another prompt can take the place of one that is
done (`Cache.admit`).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models.config import TransformerConfig
from iro_jax.models.sharding import RULES, Rules, automatic_mesh, partition_spec, pin

EMPTY = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachePart:
    """Keys and values of the tokens in one part; `lead` is `[P]`, `[P, K]` or `[P, K, B]`.

    Attributes:
      keys: one array a layer, already rotated, `[*lead, kv_heads, slots, head_dim]` packed.
      values: like `keys`.
      positions: position of each slot's token, or -1, `[*lead, slots]`.
      lengths: number of tokens held, `[*lead]`.
      cursor: the next free slot, a scalar; of the beams `[P]`.
    """

    keys: tuple[Float[Array, "*packed slots head_dim"], ...]
    values: tuple[Float[Array, "*packed slots head_dim"], ...]
    positions: Int[Array, "*lead slots"]
    lengths: Int[Array, "*lead"]
    cursor: Int[Array, "*P"]

    @classmethod
    def empty(cls, config: TransformerConfig, lead: tuple[int, ...], slots: int) -> CachePart:
        shape = (*lead, config.num_kv_heads, slots, config.head_dim)

        def zeros():
            return tuple(pack(jnp.zeros(shape, config.dtype)) for _ in config.layers)

        return cls(
            keys=zeros(),
            values=zeros(),
            positions=jnp.full((*lead, slots), EMPTY, jnp.int32),
            lengths=jnp.zeros(lead, jnp.int32),
            cursor=jnp.zeros(lead[:1] if len(lead) == 2 else (), jnp.int32),
        )

    @property
    def slots(self) -> int:
        return self.positions.shape[-1]

    def unpack(self, stored: Array) -> Float[Array, "*lead kv_heads slots head_dim"]:
        """One layer's keys or values with all of their axes."""
        lead, (slots, head_dim) = self.lengths.shape, stored.shape[-2:]
        kv_heads = math.prod(stored.shape[:-2]) // math.prod(lead)
        return stored.reshape(*lead, kv_heads, slots, head_dim)

    def append(self, new: CachePart) -> CachePart:
        """Beams with the slots of another part of theirs behind their cursors.

        There must be room for these slots. That is the caller's arithmetic, since the cursors are
        traced.
        """

        def put_layers(beams: tuple[Array, ...], fresh: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(
                pack(_put(self.unpack(x), new.unpack(y), self.cursor, -2))
                for x, y in zip(beams, fresh, strict=True)
            )

        return CachePart(
            keys=put_layers(self.keys, new.keys),
            values=put_layers(self.values, new.values),
            positions=_put(self.positions, new.positions, self.cursor, -1),
            lengths=self.lengths + new.lengths,
            # Those of a prompt that is done go on, but hold nothing new.
            cursor=jnp.minimum(self.cursor + new.slots, self.slots),
        )

    def of_one_candidate(self) -> CachePart:
        """A chunk of one candidate a beam, as slots of its beam."""
        return dataclasses.replace(
            self, positions=self.positions[:, :, 0], lengths=self.lengths[:, :, 0]
        )

    def specs(self, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> CachePart:
        """The same structure with a `PartitionSpec` for every array (or abstract array)."""
        lead = self.lengths.shape
        axes = ("batch",) + (None,) * (len(lead) - 1)

        def plain(x: Array) -> PartitionSpec:
            return partition_spec((*axes, None)[: x.ndim], x.shape, mesh, rules)

        def packed(x: Array) -> PartitionSpec:
            kept = [name for name, size in zip(axes, lead, strict=True) if size > 1]
            heads = ["kv_heads"] * (x.ndim - 2 - len(kept))
            return partition_spec((*kept, *heads, None, None), x.shape, mesh, rules)

        keys, values = jax.tree.map(packed, (self.keys, self.values))
        rest = jax.tree.map(plain, (self.positions, self.lengths, self.cursor))
        return CachePart(keys, values, *rest)

    def shardings(self, mesh: Mesh, rules: Rules = RULES) -> CachePart:
        """The same structure with a `NamedSharding` for every array (or abstract array)."""
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(mesh, rules))

    def pinned(self, rules: Rules) -> CachePart:
        """Itself, kept by the rules on the mesh of `jax.set_mesh`, if there is one."""
        mesh = automatic_mesh()
        return self if mesh is None else pin(self, self.specs(mesh, rules))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The three parts. Created empty, filled by `Network.prefill` and `Network.decode`."""

    prompt: CachePart
    beams: CachePart
    chunk: CachePart

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        *,
        num_prompts: int,
        prompt_slots: int,
        beam_width: int = 1,
        beam_slots: int = 0,
        num_successors: int = 1,
        chunk_length: int = 1,
    ) -> Cache:
        lead = (num_prompts, beam_width, num_successors)
        return cls(
            prompt=CachePart.empty(config, lead[:1], prompt_slots),
            beams=CachePart.empty(config, lead[:2], beam_slots),
            chunk=CachePart.empty(config, lead, chunk_length),
        )

    def shardings(self, mesh: Mesh, rules: Rules = RULES) -> Cache:
        return Cache(
            prompt=self.prompt.shardings(mesh, rules),
            beams=self.beams.shardings(mesh, rules),
            chunk=self.chunk.shardings(mesh, rules),
        )

    def pinned(self, rules: Rules) -> Cache:
        """Itself, kept by the rules on the mesh of `jax.set_mesh`, if there is one."""
        return Cache(
            prompt=self.prompt.pinned(rules),
            beams=self.beams.pinned(rules),
            chunk=self.chunk.pinned(rules),
        )

    def next_positions(self) -> Int[Array, "P K B"]:
        """The position of each candidate's next token."""
        return (
            self.prompt.lengths[:, None, None] + self.beams.lengths[..., None] + self.chunk.lengths
        )

    def commit(self, parents: Int[Array, "P K"], kept: Int[Array, "P K B"] | None = None) -> Cache:
        """Makes the selected candidates the new beams and empties the chunk.

        Args:
          parents: candidate `k * B + b` chosen for each new beam, in `[0, K * B)`.
          kept: how many of its beam's tokens each candidate has, as in `Network.decode`; the
            slots of the others become empty. All by default.

        The chunk's slots are appended after the beams' cursor; there must be room for
        `chunk_length` of them. That is the caller's arithmetic, since the cursor is traced.

        Raises:
          ValueError: the beams have fewer slots than one chunk.
        """
        num_prompts, width, successors = self.chunk.lengths.shape
        chex.assert_shape(parents, (num_prompts, width))
        if self.beams.slots < self.chunk.slots:
            raise ValueError(
                "The beams have no room for a chunk: beam_slots must be at least chunk_length."
                f" Got: {self.beams.slots} and {self.chunk.slots}"
            )
        beam_parents = parents // successors

        def select_beams(x):
            return take(x, beam_parents)

        def select_chunks(x):
            return take(x.reshape(num_prompts, width * successors, *x.shape[3:]), parents)

        def of_layers(part: CachePart, layers: tuple[Array, ...], select) -> tuple[Array, ...]:
            return tuple(pack(select(part.unpack(stored))) for stored in layers)

        def selected(part: CachePart, select) -> CachePart:
            return CachePart(
                keys=of_layers(part, part.keys, select),
                values=of_layers(part, part.values, select),
                positions=select(part.positions),
                lengths=select(part.lengths),
                cursor=part.cursor,
            )

        beams = selected(self.beams, select_beams)
        if kept is not None:
            lengths = select_chunks(kept)
            end = self.prompt.lengths[:, None, None] + lengths[..., None]
            positions = jnp.where(beams.positions < end, beams.positions, EMPTY)
            beams = dataclasses.replace(beams, positions=positions, lengths=lengths)
        beams = beams.append(selected(self.chunk, select_chunks))
        chunk = dataclasses.replace(
            self.chunk,
            positions=jnp.full_like(self.chunk.positions, EMPTY),
            lengths=jnp.zeros_like(self.chunk.lengths),
            cursor=jnp.zeros_like(self.chunk.cursor),
        )
        return Cache(prompt=self.prompt, beams=beams, chunk=chunk)

    def admit(self, rows: Int[Array, " A"], newcomers: Cache) -> Cache:
        """Puts other prompts, whose beams and chunks are empty, in the place of those in `rows`."""

        def replace(part: CachePart, new: CachePart, *, read: bool) -> CachePart:
            def set_rows(x: Array, y: Array) -> Array:
                return x.at[rows].set(y, unique_indices=True)

            def set_packed(x: Array, y: Array) -> Array:
                return pack(set_rows(part.unpack(x), new.unpack(y)))

            changed = dataclasses.replace(
                part,
                positions=set_rows(part.positions, new.positions),
                lengths=set_rows(part.lengths, new.lengths),
                cursor=set_rows(part.cursor, new.cursor) if part.cursor.ndim else part.cursor,
            )
            if not read:
                return changed
            keys, values = jax.tree.map(
                set_packed, (part.keys, part.values), (new.keys, new.values)
            )
            return dataclasses.replace(changed, keys=keys, values=values)

        return Cache(
            prompt=replace(self.prompt, newcomers.prompt, read=True),
            beams=replace(self.beams, newcomers.beams, read=False),
            chunk=replace(self.chunk, newcomers.chunk, read=False),
        )


def pack(x: Float[Array, "*lead kv_heads slots head_dim"]) -> Array:
    """Keys or values as they are stored: without leading axes of size one."""
    return x.reshape(*(size for size in x.shape[:-2] if size > 1), *x.shape[-2:])


@functools.partial(jax.jit, static_argnums=3)  # traced and lowered once for all layers
def _put(beams: Array, fresh: Array, cursor: Int[Array, " P"], axis: int) -> Array:
    """Beams with something fresh along `axis`, from each prompt's cursor on."""

    def of_prompt(beams, fresh, cursor):
        return lax.dynamic_update_slice_in_dim(beams, fresh, cursor, axis)

    return jax.vmap(of_prompt)(beams, fresh, cursor)


@jax.jit
def take(x: Array, indices: Int[Array, "P K"]) -> Array:
    """`x[p, indices[p, k]]` for `x` of shape `[P, M, ...]`."""
    return jax.vmap(lambda rows, chosen: rows[chosen])(x, indices)


def inherit(x: Array, parents: Int[Array, "P K"]) -> Array:
    """What selected candidates hand down: rows of `x` `[P, K, B, ...]`, one for each successor.

    Row `[p, k, :]` of the result is `x` of candidate `parents[p, k]`, B times.
    """
    chosen = take(x.reshape(x.shape[0], -1, *x.shape[3:]), parents)
    return jnp.broadcast_to(chosen[:, :, None], x.shape)


def visible(
    positions: Int[Array, "*batch length"],
    part_positions: Int[Array, "*part slots"],
    window: int | None,
    before: Int[Array, "*batch"] | None = None,
) -> Bool[Array, "*batch length slots"]:
    """Which slots each query may attend to.

    Those that are filled, not after it, within its window, and of a position below `before`.
    """
    batch = positions.shape[:-1]
    lead = part_positions.shape[:-1]
    slots = part_positions.reshape(*lead, *(1,) * (len(batch) - len(lead) + 1), -1)
    queries = positions[..., None]
    seen = (slots != EMPTY) & (slots <= queries)
    if window is not None:
        seen &= slots > queries - window
    if before is not None:
        seen &= slots < before[..., None, None]
    return seen
