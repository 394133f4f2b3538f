"""The fused draw for TPUs: rows in VMEM, or over shards a kernel for the sums.

Letters as in `kernels.sampling_algorithm`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from kernels.sampling_algorithm import SMALLEST, Drawn, Warpers, as_drawn, draw, ordinal, words_of
from kernels.sampling_tile import Tile, columns_like, registers
from kernels.sampling_xla import Arrays
from kernels.shapes import LANES, result_like, round_up

_TPU_ROWS = 8
_TPU_CHUNK = 2048


def tpu_kernel(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    warpers: Warpers,
    interpret: bool = False,
) -> Drawn:
    """`fused_draw` in one Mosaic launch; eight rows at a time stay in VMEM throughout."""
    rows, size = logits.shape
    padded = round_up(size, min(_TPU_CHUNK, round_up(size, LANES)))
    scratch = pltpu.VMEM((_TPU_ROWS, padded), jnp.float32)
    tile_bytes = 4 * _TPU_ROWS * padded

    def body(
        high_ref, low_ref, logits_ref, token_ref, log_prob_ref, warped_ref, scaled_ref, other_ref
    ):
        vocabulary = Tile(registers(logits_ref, scaled_ref, other_ref), size, _TPU_CHUNK)
        drawn = draw(vocabulary, (high_ref[...], low_ref[...]), warpers)
        token_ref[...], log_prob_ref[...], warped_ref[...] = drawn

    column = pl.BlockSpec((_TPU_ROWS, 1), lambda i: (i, 0))
    return as_drawn(
        pl.pallas_call(
            body,
            grid=(pl.cdiv(rows, _TPU_ROWS),),
            in_specs=[
                column,
                column,
                pl.BlockSpec((_TPU_ROWS, padded), lambda i: (i, 0), pipeline_mode=pl.Buffered(1)),
            ],
            out_specs=[column] * 3,
            out_shape=columns_like(logits),
            scratch_shapes=[scratch, scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=3 * tile_bytes + 2**22
            ),
            interpret=interpret,
            name="fused_draw",
        )(*words_of(key_data), logits)
    )


def sharded_tpu_kernel(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    warpers: Warpers,
    axis_name: str,
    interpret: bool = False,
) -> Drawn:
    """`fused_draw` over shards, whose weights above thresholds a Mosaic kernel sums.

    The rest is a handful of elementwise expressions and reductions, which XLA fuses as well.
    """
    return as_drawn(draw(_ArraysOnTpu(logits, axis_name, interpret), words_of(key_data), warpers))


class _ArraysOnTpu(Arrays):
    """Arrays that one kernel reads once for all thresholds."""

    def __init__(self, logits, axis_name, interpret: bool):
        super().__init__(logits, axis_name)
        self.interpret = interpret

    def weight_from(self, thresholds, order, weight):
        sources = [self.values[name] for name in (order, weight) if name is not None]
        columns = jnp.concatenate(thresholds, axis=-1)
        return self.split(self.across(lax.psum, _weight_from(columns, sources, self.interpret)))


def _weight_from(
    thresholds: Int[Array, "R n"], sources: list[Float[Array, "R V"]], interpret: bool
) -> Float[Array, "R n"]:
    """`Vocabulary.weight_from` for many thresholds, in one reading of the sources."""
    rows, size = sources[0].shape
    count = thresholds.shape[-1]
    chunk = min(_TPU_CHUNK, round_up(size, LANES))
    chunks = pl.cdiv(size, chunk)

    def body(thresholds_ref, *refs):
        *source_refs, out_ref = refs

        @pl.when(pl.program_id(1) == 0)
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

        inside = pl.program_id(1) * chunk + lax.broadcasted_iota(jnp.int32, (1, chunk), 1) < size
        ordinals = jnp.where(inside, ordinal(source_refs[0][...]), SMALLEST)
        weights = source_refs[1][...] if len(source_refs) == 2 else jnp.float32(1)
        thresholds = thresholds_ref[...]
        found = [
            jnp.sum(
                jnp.where(ordinals >= thresholds[:, i : i + 1], weights, 0.0),
                axis=-1,
                keepdims=True,
            )
            for i in range(count)
        ]
        out_ref[...] += jnp.concatenate(found, axis=-1)

    column = pl.BlockSpec((_TPU_ROWS, count), lambda i, j: (i, 0))
    return pl.pallas_call(
        body,
        grid=(pl.cdiv(rows, _TPU_ROWS), chunks),
        in_specs=[column, *[pl.BlockSpec((_TPU_ROWS, chunk), lambda i, j: (i, j))] * len(sources)],
        out_specs=column,
        out_shape=result_like(sources[0], (rows, count)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="weight_from",
    )(thresholds, *sources)
