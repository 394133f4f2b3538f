"""Attention of one decode step over a shared prompt, shared beams and own chunks.

All candidates of a prompt attend to the same prompt keys, and the B successors of a beam to
the same beam keys. A kernel reads each of these once from main memory for all query rows that
share them, skips the beam slots that are not filled yet, and never writes scores out.

The softmax over the three parts is computed online (Milakov and Gimelshein 2018): a row keeps
the largest score so far, and the weights' sum and the weighted values relative to it.

Letters: P prompts, K beams, B successors a beam, G query heads a key-value head, S prompt
slots, T beam slots, L chunk slots, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from kernels.dispatch import Implementation, dispatch, result_like

# Finite, so that a row that has seen nothing yet yields exp(0) * 0, not exp(-inf + inf).
_HIDDEN = -1e30

_LANES = 128
_SUBLANES = 16

# Keys in one block of the TPU kernel, in bytes. It holds eight blocks: keys and values of the
# prompt and of the beams, each twice so that the next block is fetched meanwhile.
_TPU_BLOCK_BYTES = 2**20
_TPU_BLOCK_SLOTS = 512

# Slots that one GPU program attends to, and slots in each of its products.
_GPU_SPLIT = 512
_GPU_BLOCK = 64
_GPU_ROWS = 64


class Part(NamedTuple):
    """Keys and values of one part; `lead` is `[P]`, `[P, K]` or `[P, K, B]`.

    Attributes:
      keys: rotated keys, `[*lead, kv_heads, slots, D]`.
      values: like `keys`.
      positions: position of each slot's token, -1 where it is empty, `[*lead, slots]`.
    """

    keys: Float[Array, "*lead kv_heads slots D"]
    values: Float[Array, "*lead kv_heads slots D"]
    positions: Int[Array, "*lead slots"]


class _State(NamedTuple):
    """Attention so far: weighted values, sum of weights, and the score both are relative to."""

    numerator: Float[Array, "*batch rows D"]
    denominator: Float[Array, "*batch rows 1"]
    maximum: Float[Array, "*batch rows 1"]


def prefix_attention(
    queries: Float[Array, "P K B kv_heads G D"],
    query_positions: Int[Array, "P K B"],
    prompt: Part,
    beams: Part,
    chunk: Part,
    cursor: Int[Array, ""],
    *,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "P K B kv_heads G D"]:
    """Attends from one new token per candidate to its prompt, its beam and its own chunk.

    A slot is visible if it is filled, not after the query and, with a window, less than
    `window` positions before it.

    Args:
      queries: scaled and rotated, of the keys' dtype.
      query_positions: position of each candidate's new token.
      prompt: keys and values shared by a prompt's candidates, slots S.
      beams: shared by a beam's successors, slots T, which may be 0.
      chunk: each candidate's own, slots L.
      cursor: number of beam slots in use; those from there on are empty.
      window: width of a sliding window.
      softcap: scores become `softcap * tanh(score / softcap)`.
      implementation: see `kernels.Implementation`.

    Returns:
      The attention output, f32. A query that sees nothing gets zeros.

    Raises:
      ValueError: queries and keys differ in dtype, or shapes do not fit together.
    """
    _check(queries, query_positions, prompt, beams, chunk)
    if beams.keys.shape[-2] == 0:
        beams = _one_empty_slot(beams)
        cursor = jnp.zeros_like(cursor)
    options: dict[str, Any] = {"window": window, "softcap": softcap}
    return dispatch(
        implementation,
        queries,
        query_positions,
        prompt,
        beams,
        chunk,
        cursor,
        xla=functools.partial(reference, **options),
        tpu=functools.partial(tpu_kernel, **options),
        gpu=functools.partial(gpu_kernel, **options),
        interpret=functools.partial(tpu_kernel, interpret=True, **options),
    )


def reference(
    queries: Float[Array, "P K B kv_heads G D"],
    query_positions: Int[Array, "P K B"],
    prompt: Part,
    beams: Part,
    chunk: Part,
    cursor: Int[Array, ""],
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "P K B kv_heads G D"]:
    """`prefix_attention` in plain XLA. It computes all beam slots, whatever the cursor."""
    del cursor
    states = []
    for part in (prompt, beams, chunk):
        lead = part.positions.shape[:-1]
        q = _to_rows(queries, len(lead))
        positions = _to_row_positions(query_positions, len(lead), queries.shape[-2])
        visible = _visible(
            positions[..., None, :, None], part.positions[..., None, None, :], window
        )
        state = _absorb(_nothing_seen(q.shape), q, part.keys, part.values, visible, softcap)
        states.append(_State(*(_from_rows(x, queries.shape)[None] for x in state)))
    return _merge(states)


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
    rows = _round_up(successors * group, _SUBLANES)
    blocks = _Blocks.of(prompt, beams, width * rows, block_slots)

    # [P, kv_heads, K * rows, D], each beam's rows padded by some that see nothing.
    q = queries.transpose(0, 3, 1, 2, 4, 5)
    q = _pad_to(q.reshape(*q.shape[:3], successors * group, head_dim), 3, rows, 0)
    q = q.reshape(num_prompts, kv_heads, width * rows, head_dim)
    row_positions = _pad_to(jnp.repeat(query_positions, group, axis=-1), 2, rows, -1)

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
class _Blocks:
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
    def of(cls, prompt: Part, beams: Part, rows: int, block_slots: int | None) -> _Blocks:
        """Blocks of at most 512 slots whose keys, and whose scores for all rows, fit in VMEM."""
        kv_heads, prompt_slots, head_dim = prompt.keys.shape[-3:]
        beam_slots = beams.keys.shape[-2]
        slot_bytes = _round_up(head_dim, _LANES) * prompt.keys.dtype.itemsize
        room = max(_LANES, min(_TPU_BLOCK_BYTES // slot_bytes, _TPU_BLOCK_BYTES // (4 * rows)))
        heads = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * _LANES <= room)
        limit = block_slots or min(_TPU_BLOCK_SLOTS, room // heads // _LANES * _LANES)
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


def _rows_spec(blocks: _Blocks, rows: int, head_dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, blocks.heads, rows, head_dim), lambda p, h, j, c: (p, h, 0, 0))


def _tpu_in_specs(blocks: _Blocks, rows: int, head_dim: int, chunk: Part) -> list[pl.BlockSpec]:
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
    blocks: _Blocks,
    rows: int,
    group: int,
    window: int | None,
    softcap: float | None,
):
    """One step: rows `[heads, K * rows, D]` attend to a block `[heads, slots, D]`."""
    prompt_refs, beam_refs, chunk_refs = Part(*refs[:3]), Part(*refs[3:6]), Part(*refs[6:9])
    out_ref, state_refs = refs[9], _State(*refs[10:])
    step = pl.program_id(2)
    beam, block = blocks.beam(step)
    beam_rows = pl.ds(pl.multiple_of(beam * rows, rows), rows)
    beam_first = block * blocks.beam_block

    @pl.when(step == 0)
    def _():
        for ref, start in zip(state_refs, (0.0, 0.0, _HIDDEN), strict=True):
            ref[...] = jnp.full_like(ref, start)

    def attend(which, keys, values, visible):
        state = _State(*(ref[:, which] for ref in state_refs))
        state = _absorb(state, queries_ref[:, which], keys, values, visible, softcap)
        for ref, value in zip(state_refs, state, strict=True):
            ref[:, which] = value

    def attend_block(which, part_refs, first, slots):
        positions, values = part_refs.positions[...], part_refs.values[...]
        if slots % positions.shape[-1]:
            # The last block reaches beyond the array, where anything may stand.
            positions = jnp.where(first + _iota(positions.shape, 1) < slots, positions, -1)
            inside = first + _iota(values.shape, 1) < slots
            values = jnp.where(inside, values, jnp.zeros_like(values))
        visible = _visible(row_positions_ref[which], positions, window)
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
            attend(beam_rows, keys, values, _visible(own, positions, window))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = _normalise(state_refs.numerator[...], state_refs.denominator[...])


def gpu_kernel(
    queries: Float[Array, "P K B kv_heads G D"],
    query_positions: Int[Array, "P K B"],
    prompt: Part,
    beams: Part,
    chunk: Part,
    cursor: Int[Array, ""],
    *,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "P K B kv_heads G D"]:
    """`prefix_attention` in one Triton launch per part, merged by XLA.

    A program attends from up to 64 rows to up to 512 slots of one key-value head, so that a few
    prompts fill the device. More than 64 rows share keys through the second-level cache.
    """
    everything = jnp.int32(2**30)
    states = []
    for part, used in ((prompt, everything), (beams, cursor), (chunk, everything)):
        lead = part.positions.shape[:-1]
        q = _to_rows(queries, len(lead))
        positions = _to_row_positions(query_positions, len(lead), queries.shape[-2])
        state = _gpu_partial(
            q.reshape(-1, *q.shape[-3:]),
            positions.reshape(-1, positions.shape[-1]),
            Part(*(x.reshape(-1, *x.shape[len(lead) :]) for x in part)),
            used,
            window,
            softcap,
            interpret,
        )
        states.append(
            _State(
                *(
                    _from_rows(x.reshape(-1, *lead, *x.shape[2:]), (x.shape[0], *queries.shape))
                    for x in state
                )
            )
        )
    return _merge(states)


def _gpu_partial(
    queries: Float[Array, "N kv_heads rows D"],
    row_positions: Int[Array, "N rows"],
    part: Part,
    used: Int[Array, ""],
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> _State:
    """Attention to the slots of each split: `[splits, N, kv_heads, rows, D or 1]`."""
    count, kv_heads, rows, head_dim = queries.shape
    slots = part.keys.shape[-2]
    splits = pl.cdiv(slots, _GPU_SPLIT)
    tile = min(_GPU_ROWS, max(16, pl.next_power_of_2(rows)))
    # Triton's arrays are powers of two: blocks reach beyond the arrays and loads are masked.
    row_blocks, padded_slots = pl.cdiv(rows, tile), splits * _GPU_SPLIT
    width = max(16, pl.next_power_of_2(head_dim))
    body = functools.partial(
        _gpu_body, rows=rows, slots=slots, head_dim=head_dim, window=window, softcap=softcap
    )
    slots_spec = pl.BlockSpec((None, None, padded_slots, width), lambda n, h, r, s: (n, h, 0, 0))
    out_specs = [
        pl.BlockSpec((None, None, None, tile, size), lambda n, h, r, s: (s, n, h, r, 0))
        for size in (width, 1, 1)
    ]
    return _State(
        *pl.pallas_call(
            body,
            grid=(count, kv_heads, row_blocks, splits),
            in_specs=[
                pl.BlockSpec((1,), lambda n, h, r, s: (0,)),
                pl.BlockSpec((None, None, tile, width), lambda n, h, r, s: (n, h, r, 0)),
                pl.BlockSpec((None, tile), lambda n, h, r, s: (n, r)),
                slots_spec,
                slots_spec,
                pl.BlockSpec((None, padded_slots), lambda n, h, r, s: (n, 0)),
            ],
            out_specs=out_specs,
            out_shape=[
                result_like(queries, (splits, count, kv_heads, rows, size))
                for size in (head_dim, 1, 1)
            ],
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="prefix_attention_part",
        )(jnp.reshape(used, (1,)).astype(jnp.int32), queries, row_positions, *part)
    )


def _gpu_body(
    used_ref,
    queries_ref,
    row_positions_ref,
    keys_ref,
    values_ref,
    positions_ref,
    numerator_ref,
    denominator_ref,
    maximum_ref,
    *,
    rows: int,
    slots: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
):
    """Some rows' attention to the slots of one split."""
    tile, width = queries_ref.shape
    inside = jnp.arange(width)[None] < head_dim
    present = pl.program_id(2) * tile + jnp.arange(tile) < rows
    queries = plgpu.load(queries_ref, mask=present[:, None] & inside, other=0)
    row_positions = plgpu.load(row_positions_ref, mask=present, other=-1)[:, None]
    first = pl.program_id(3) * _GPU_SPLIT
    end = jnp.minimum(jnp.minimum(used_ref[0], slots), first + _GPU_SPLIT)

    def attend_block(block, state):
        start = first + block * _GPU_BLOCK
        which = pl.ds(start, _GPU_BLOCK)
        filled = start + jnp.arange(_GPU_BLOCK) < slots
        loaded = filled[:, None] & inside
        keys = plgpu.load(keys_ref.at[which], mask=loaded, other=0)
        values = plgpu.load(values_ref.at[which], mask=loaded, other=0)
        positions = plgpu.load(positions_ref.at[which], mask=filled, other=-1)
        visible = _visible(row_positions, positions[None], window)
        return _absorb(state, queries, keys, values, visible, softcap)

    blocks = pl.cdiv(jnp.maximum(end - first, 0), _GPU_BLOCK)
    state = lax.fori_loop(0, blocks, attend_block, _nothing_seen((tile, width)))
    plgpu.store(numerator_ref, state.numerator, mask=present[:, None] & inside)
    plgpu.store(denominator_ref, state.denominator, mask=present[:, None])
    plgpu.store(maximum_ref, state.maximum, mask=present[:, None])


def _nothing_seen(shape: tuple[int, ...]) -> _State:
    """The state to begin with, of queries `[*batch, rows, D]`."""
    column = (*shape[:-1], 1)
    return _State(
        numerator=jnp.zeros(shape, jnp.float32),
        denominator=jnp.zeros(column, jnp.float32),
        maximum=jnp.full(column, _HIDDEN, jnp.float32),
    )


def _absorb(
    state: _State,
    queries: Float[Array, "*batch rows D"],
    keys: Float[Array, "*batch slots D"],
    values: Float[Array, "*batch slots D"],
    visible: Bool[Array, "*#batch rows slots"],
    softcap: float | None,
) -> _State:
    """The state after attending to these slots as well."""
    visible = jnp.broadcast_to(visible, (*queries.shape[:-1], keys.shape[-2]))
    scores = _cap(_matmul(queries, keys, contract=-1), softcap)
    scores = jnp.where(visible, scores, _HIDDEN)
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - maximum), 0.0)
    scale = jnp.exp(state.maximum - maximum)
    return _State(
        numerator=scale * state.numerator
        + _matmul(weights.astype(values.dtype), values, contract=-2),
        denominator=scale * state.denominator + jnp.sum(weights, axis=-1, keepdims=True),
        maximum=maximum,
    )


def _merge(states: Sequence[_State]) -> Float[Array, "*rows D"]:
    """The attention output of several states, each with a leading axis of as many again."""
    state = _State(*(jnp.concatenate(x) for x in zip(*states, strict=True)))
    scale = jnp.exp(state.maximum - jnp.max(state.maximum, axis=0))
    return _normalise(
        jnp.sum(scale * state.numerator, axis=0), jnp.sum(scale * state.denominator, axis=0)
    )


def _matmul(
    x: Float[Array, "*batch rows n"], y: Float[Array, "*batch a b"], contract: int
) -> Float[Array, "*batch rows m"]:
    """Products of `x`'s last axis with axis `contract` of `y`, in f32 throughout for f32."""
    batch = tuple(range(x.ndim - 2))
    return lax.dot_general(
        x,
        y,
        (((x.ndim - 1,), (y.ndim + contract,)), (batch, batch)),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _to_rows(
    queries: Float[Array, "P K B kv_heads G D"], axes: int
) -> Float[Array, "*lead kv_heads rows D"]:
    """The queries that share a part whose leading axes are the first `axes` of theirs."""
    lead, (kv_heads, group, head_dim) = queries.shape[:axes], queries.shape[3:]
    x = queries.reshape(*lead, -1, kv_heads, group, head_dim)
    return jnp.swapaxes(x, axes, axes + 1).reshape(*lead, kv_heads, -1, head_dim)


def _from_rows(
    x: Float[Array, "*lead kv_heads rows n"], shape: tuple[int, ...]
) -> Float[Array, "*P_K_B kv_heads G n"]:
    """Undoes `_to_rows`: to queries' `shape`, but for the size of the last axis."""
    *lead, kv_heads, _, size = x.shape
    x = x.reshape(*lead, kv_heads, -1, shape[-2], size)
    return jnp.swapaxes(x, len(lead), len(lead) + 1).reshape(*shape[:-1], size)


def _to_row_positions(
    positions: Int[Array, "P K B"], axes: int, group: int
) -> Int[Array, "*lead rows"]:
    return jnp.repeat(positions.reshape(*positions.shape[:axes], -1), group, axis=-1)


def _visible(
    queries: Int[Array, "*#shape"], slots: Int[Array, "*#shape"], window: int | None
) -> Bool[Array, "*shape"]:
    """Which slots each query may attend to, by their positions."""
    seen = (slots != -1) & (slots <= queries)
    if window is not None:
        seen &= slots > queries - window
    return seen


def _cap(scores: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _normalise(
    numerator: Float[Array, "*rows D"], denominator: Float[Array, "*rows 1"]
) -> Float[Array, "*rows D"]:
    return numerator / jnp.maximum(denominator, 1e-37)


def _iota(shape: tuple[int, ...], axis: int) -> Int[Array, "*shape"]:
    """TPU has no iota of one dimension, and `jnp.arange` would make one."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad_to(x: Array, axis: int, size: int, fill: int) -> Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding, constant_values=fill)


def _one_empty_slot(part: Part) -> Part:
    """A part of one slot in place of a part of none, which a kernel could not address."""
    return Part(
        keys=_pad_to(part.keys, -2, 1, 0),
        values=_pad_to(part.values, -2, 1, 0),
        positions=_pad_to(part.positions, -1, 1, -1),
    )


def _check(queries, query_positions, prompt, beams, chunk):
    """Raises a ValueError where shapes or types do not fit together."""
    lead = query_positions.shape
    *_, kv_heads, _, head_dim = queries.shape
    if queries.shape[:-3] != lead:
        raise ValueError(
            "queries [P, K, B, kv_heads, G, D] and query_positions [P, K, B] must agree."
            f" Got: {queries.shape} and {lead}"
        )
    for name, part, axes in (("prompt", prompt, 1), ("beams", beams, 2), ("chunk", chunk, 3)):
        expected = (*lead[:axes], kv_heads, part.positions.shape[-1], head_dim)
        if part.keys.shape != expected or part.values.shape != expected:
            raise ValueError(
                f"The {name}'s keys and values must have shape {expected}."
                f" Got: {part.keys.shape} and {part.values.shape}"
            )
        if part.keys.dtype != queries.dtype or part.values.dtype != queries.dtype:
            raise ValueError(
                f"The {name}'s keys and values must have the queries' dtype {queries.dtype}."
                f" Got: {part.keys.dtype} and {part.values.dtype}"
            )
