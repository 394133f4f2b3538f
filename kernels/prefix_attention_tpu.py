"""`prefix_attention` as one Mosaic kernel for TPUs, over blocks of slots in VMEM.

Letters as in `kernels.prefix_attention`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.online_softmax import HIDDEN, State, absorb, normalise
from kernels.prefix_attention_parts import Part, may_attend
from kernels.shapes import LANES, pad_to, result_like, round_up

_SUBLANES = 16

# Keys in one block of the TPU kernel, in bytes. It holds eight blocks: keys and values of the
# prompt and of the beams, each twice so that the next block is fetched meanwhile.
_TPU_BLOCK_BYTES = 2**20
_TPU_BLOCK_SLOTS = 512


def tpu_kernel(
    queries: Float[Array, "P K B kv_heads G D"],
    query_positions: Int[Array, "P K B"],
    prompt: Part,
    beams: Part,
    chunk: Part,
    cursor: Int[Array, ""],
    *,
    window: int | None = None,
    softcap: float | None = None,
    block_slots: int | None = None,
    interpret: bool = False,
) -> Float[Array, "P K B kv_heads G D"]:
    """`prefix_attention` in one Mosaic launch.

    A prompt's steps run over the blocks of its prompt, which all rows attend to, and then, beam
    after beam, over the blocks of the beam and the chunks of its successors, which only the
    beam's rows attend to. Steps that have nothing to do repeat the index of the block that is
    loaded already, so nothing is fetched for them.

    Args:
      block_slots: slots in a block, a multiple of 128; by default about one MiB of keys.
    """
    num_prompts, width, successors, kv_heads, group, head_dim = queries.shape
    rows = round_up(successors * group, _SUBLANES)
    blocks = Blocks.of(prompt, beams, width * rows, block_slots)

    # [P, kv_heads, K * rows, D], each beam's rows padded by some that see nothing.
    q = queries.transpose(0, 3, 1, 2, 4, 5)
    q = pad_to(q.reshape(*q.shape[:3], successors * group, head_dim), 3, rows, 0)
    q = q.reshape(num_prompts, kv_heads, width * rows, head_dim)
    row_positions = pad_to(jnp.repeat(query_positions, group, axis=-1), 2, rows, -1)

    out = pl.pallas_call(
        functools.partial(
            _tpu_body, blocks=blocks, rows=rows, group=group, window=window, softcap=softcap
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_prompts, kv_heads // blocks.heads, blocks.steps(width)),
            in_specs=_tpu_in_specs(blocks, width * rows, head_dim, chunk),
            out_specs=_rows_spec(blocks, width * rows, head_dim),
            scratch_shapes=[
                pltpu.VMEM((blocks.heads, width * rows, size), jnp.float32)
                for size in (head_dim, 1, 1)
            ],
        ),
        out_shape=result_like(q, q.shape),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="prefix_attention",
    )(
        jnp.reshape(cursor, (1,)).astype(jnp.int32),
        q,
        row_positions.reshape(num_prompts, width * rows, 1),
        *prompt._replace(positions=prompt.positions[..., None, :]),
        *beams._replace(positions=beams.positions[..., None, :]),
        *chunk._replace(positions=chunk.positions[..., None, :]),
    )
    out = out.reshape(num_prompts, kv_heads, width, rows, head_dim)[..., : successors * group, :]
    out = out.reshape(num_prompts, kv_heads, width, successors, group, head_dim)
    return out.transpose(0, 2, 3, 1, 4, 5)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the TPU kernel cuts keys into blocks, and which of them a step works on.

        step      0 .. a-1             prompt blocks, a of them
                  a + k * (b + 1) + i  block i of beam k, b of them
                  a + k * (b + 1) + b  chunks of beam k's successors

    Attributes:
      heads: key-value heads in a block.
      prompt_block, beam_block: slots in a block.
      prompt_slots, beam_slots: slots in all.
    """

    heads: int
    prompt_block: int
    beam_block: int
    prompt_slots: int
    beam_slots: int

    @classmethod
    def of(cls, prompt: Part, beams: Part, rows: int, block_slots: int | None) -> Blocks:
        """Blocks of at most 512 slots whose keys, and whose scores for all rows, fit in VMEM."""
        kv_heads, prompt_slots, head_dim = prompt.keys.shape[-3:]
        beam_slots = beams.keys.shape[-2]
        slot_bytes = round_up(head_dim, LANES) * prompt.keys.dtype.itemsize
        room = max(LANES, min(_TPU_BLOCK_BYTES // slot_bytes, _TPU_BLOCK_BYTES // (4 * rows)))
        heads = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * LANES <= room)
        limit = block_slots or min(_TPU_BLOCK_SLOTS, room // heads // LANES * LANES)
        return cls(
            heads, min(limit, prompt_slots), min(limit, beam_slots), prompt_slots, beam_slots
        )

    @property
    def prompt_blocks(self) -> int:
        return pl.cdiv(self.prompt_slots, self.prompt_block)

    @property
    def beam_blocks(self) -> int:
        return pl.cdiv(self.beam_slots, self.beam_block)

    def steps(self, width: int) -> int:
        return self.prompt_blocks + width * (self.beam_blocks + 1)

    def beam(self, step: Array) -> tuple[Array, Array]:
        """Beam and its block of a step; the first of each while the prompt's turn lasts."""
        step = jnp.maximum(step - self.prompt_blocks, 0)
        return step // (self.beam_blocks + 1), step % (self.beam_blocks + 1)

    def loaded_prompt(self, step: Array) -> Array:
        """The prompt block to have in VMEM: the last one once the prompt's turn is over."""
        return jnp.minimum(step, self.prompt_blocks - 1)

    def loaded_beam(self, step: Array, cursor: Array) -> tuple[Array, Array]:
        """The beam and its block to have in VMEM: none that lies beyond the cursor."""
        used = pl.cdiv(cursor, self.beam_block)
        beam, block = self.beam(step)
        return jnp.where(used > 0, beam, 0), jnp.clip(block, 0, jnp.maximum(used - 1, 0))


def _rows_spec(blocks: Blocks, rows: int, head_dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, blocks.heads, rows, head_dim), lambda p, h, j, c: (p, h, 0, 0))


def _tpu_in_specs(blocks: Blocks, rows: int, head_dim: int, chunk: Part) -> list[pl.BlockSpec]:
    """Of the queries, their positions, and keys, values and positions of the three parts."""
    heads = blocks.heads
    successors, (chunk_slots, _) = chunk.keys.shape[2], chunk.keys.shape[-2:]

    def prompt_keys(p, h, j, c):
        return p, h, blocks.loaded_prompt(j), 0

    def prompt_positions(p, h, j, c):
        return p, 0, blocks.loaded_prompt(j)

    def beam_keys(p, h, j, c):
        beam, block = blocks.loaded_beam(j, c[0])
        return p, beam, h, block, 0

    def beam_positions(p, h, j, c):
        beam, block = blocks.loaded_beam(j, c[0])
        return p, beam, 0, block

    def chunk_keys(p, h, j, c):
        return p, blocks.beam(j)[0], 0, h, 0, 0

    def chunk_positions(p, h, j, c):
        return p, blocks.beam(j)[0], 0, 0, 0

    return [
        _rows_spec(blocks, rows, head_dim),
        pl.BlockSpec((None, rows, 1), lambda p, h, j, c: (p, 0, 0)),
        *[pl.BlockSpec((None, heads, blocks.prompt_block, head_dim), prompt_keys)] * 2,
        pl.BlockSpec((None, 1, blocks.prompt_block), prompt_positions),
        *[pl.BlockSpec((None, None, heads, blocks.beam_block, head_dim), beam_keys)] * 2,
        pl.BlockSpec((None, None, 1, blocks.beam_block), beam_positions),
        *[pl.BlockSpec((None, None, successors, heads, chunk_slots, head_dim), chunk_keys)] * 2,
        pl.BlockSpec((None, None, successors, 1, chunk_slots), chunk_positions),
    ]


def _tpu_body(
    cursor_ref,
    queries_ref,
    row_positions_ref,
    *refs,
    blocks: Blocks,
    rows: int,
    group: int,
    window: int | None,
    softcap: float | None,
):
    """One step: rows `[heads, K * rows, D]` attend to a block `[heads, slots, D]`."""
    prompt_refs, beam_refs, chunk_refs = Part(*refs[:3]), Part(*refs[3:6]), Part(*refs[6:9])
    out_ref, state_refs = refs[9], State(*refs[10:])
    step = pl.program_id(2)
    beam, block = blocks.beam(step)
    beam_rows = pl.ds(pl.multiple_of(beam * rows, rows), rows)
    beam_first = block * blocks.beam_block

    @pl.when(step == 0)
    def _():
        for ref, start in zip(state_refs, (0.0, 0.0, HIDDEN), strict=True):
            ref[...] = jnp.full_like(ref, start)

    def attend(which, keys, values, visible):
        state = State(*(ref[:, which] for ref in state_refs))
        state = absorb(state, queries_ref[:, which], keys, values, visible, softcap)
        for ref, value in zip(state_refs, state, strict=True):
            ref[:, which] = value

    def attend_block(which, part_refs, first, slots):
        positions, values = part_refs.positions[...], part_refs.values[...]
        if slots % positions.shape[-1]:
            # The last block reaches beyond the array, where anything may stand.
            positions = jnp.where(first + _iota(positions.shape, 1) < slots, positions, -1)
            inside = first + _iota(values.shape, 1) < slots
            values = jnp.where(inside, values, jnp.zeros_like(values))
        visible = may_attend(row_positions_ref[which], positions, window)
        attend(which, part_refs.keys[...], values, visible)

    @pl.when(step < blocks.prompt_blocks)
    def _():
        attend_block(slice(None), prompt_refs, step * blocks.prompt_block, blocks.prompt_slots)

    beam_turn = step >= blocks.prompt_blocks

    @pl.when(beam_turn & (block < blocks.beam_blocks) & (beam_first < cursor_ref[0]))
    def _():
        attend_block(beam_rows, beam_refs, beam_first, blocks.beam_slots)

    @pl.when(beam_turn & (block == blocks.beam_blocks))
    def _():
        row_positions = row_positions_ref[beam_rows]
        owner = _iota(row_positions.shape, 0) // group

        @pl.loop(0, chunk_refs.keys.shape[0])
        def _(successor):
            keys, values, positions = (ref[successor] for ref in chunk_refs)
            own = jnp.where(owner == successor, row_positions, -1)
            attend(beam_rows, keys, values, may_attend(own, positions, window))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = normalise(state_refs.numerator[...], state_refs.denominator[...])


def _iota(shape: tuple[int, ...], axis: int) -> Int[Array, "*shape"]:
    """TPU has no iota of one dimension, and `jnp.arange` would make one."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)
