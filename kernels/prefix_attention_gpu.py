"""`prefix_attention` as Triton kernels for GPUs, one launch a part.

Letters as in `kernels.prefix_attention`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kernels.online_softmax import State, absorb, merge, nothing_seen
from kernels.prefix_attention_parts import Part, from_rows, may_attend, to_row_positions, to_rows
from kernels.shapes import result_like

# Slots that one GPU program attends to, and slots in each of its products.
_GPU_SPLIT = 512
_GPU_BLOCK = 64
_GPU_ROWS = 64


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
        q = to_rows(queries, len(lead))
        positions = to_row_positions(query_positions, len(lead), queries.shape[-2])
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
            State(
                *(
                    from_rows(x.reshape(-1, *lead, *x.shape[2:]), (x.shape[0], *queries.shape))
                    for x in state
                )
            )
        )
    return merge(states)


def _gpu_partial(
    queries: Float[Array, "N kv_heads rows D"],
    row_positions: Int[Array, "N rows"],
    part: Part,
    used: Int[Array, ""],
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> State:
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
    return State(
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
        visible = may_attend(row_positions, positions[None], window)
        return absorb(state, queries, keys, values, visible, softcap)

    blocks = pl.cdiv(jnp.maximum(end - first, 0), _GPU_BLOCK)
    state = lax.fori_loop(0, blocks, attend_block, nothing_seen((tile, width)))
    plgpu.store(numerator_ref, state.numerator, mask=present[:, None] & inside)
    plgpu.store(denominator_ref, state.denominator, mask=present[:, None])
    plgpu.store(maximum_ref, state.maximum, mask=present[:, None])
