"""The fused draw for GPUs, a Triton program per row.

Letters as in `kernels.sampling_algorithm`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, UInt32

from kernels.sampling_algorithm import Drawn, Warpers, as_drawn, draw, words_of
from kernels.sampling_tile import Tile, columns_like, registers
from kernels.shapes import result_like, round_up

_GPU_CHUNK = 2048


def gpu_kernel(
    key_data: UInt32[Array, "R 2"],
    logits: Float[Array, "R V"],
    warpers: Warpers,
    interpret: bool = False,
) -> Drawn:
    """`fused_draw` in one Triton launch, a program per row."""
    rows, size = logits.shape
    padded = round_up(size, min(_GPU_CHUNK, pl.next_power_of_2(size)))

    def body(
        high_ref, low_ref, logits_ref, token_ref, log_prob_ref, warped_ref, scaled_ref, other_ref
    ):
        vocabulary = _Row(registers(logits_ref, scaled_ref, other_ref), size, interpret)
        drawn = draw(vocabulary, (high_ref[...], low_ref[...]), warpers)
        token_ref[...], log_prob_ref[...], warped_ref[...] = drawn

    column = pl.BlockSpec((1, 1), lambda i: (i, 0))
    row = pl.BlockSpec((1, padded), lambda i: (i, 0))
    # Triton has no scratch of this size, so the buffers are results that nobody reads.
    buffer = result_like(logits, (rows, padded))
    *drawn, _, _ = pl.pallas_call(
        body,
        grid=(rows,),
        in_specs=[column, column, row],
        out_specs=[column, column, column, row, row],
        out_shape=[*columns_like(logits), buffer, buffer],
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=interpret,
        name="fused_draw",
    )(*words_of(key_data), logits)
    return as_drawn(drawn)


class _Row(Tile):
    """One row in a GPU's memory."""

    def __init__(self, refs, size, interpret: bool):
        super().__init__(refs, size, _GPU_CHUNK)
        self.interpret = interpret

    def load(self, name, start):
        if name != "logits":
            return super().load(name, start)
        return plgpu.load(
            self.refs[name].at[:, pl.ds(start, self.chunk)],
            mask=self.ids(start) < self.size,
            other=-jnp.inf,
        )

    def assign(self, name, fn, *sources):
        self._wait()
        super().assign(name, fn, *sources)
        self._wait()

    def _wait(self):
        """Until all threads of the program have stored or loaded what they had to."""
        if not self.interpret:
            plgpu.debug_barrier()
