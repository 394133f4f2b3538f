"""Attention of one decode step over a shared prompt, shared beams and own chunks.

All candidates of a prompt attend to the same prompt keys, and the B successors of a beam to
the same beam keys. A kernel reads each of these once from main memory for all query rows that
share them, skips the beam slots that are not filled yet, and never writes scores out.

Letters: P prompts, K beams, B successors a beam, G query heads a key-value head, S prompt
slots, T beam slots, L chunk slots, D head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.dispatch import Implementation, dispatch
from kernels.online_softmax import State, absorb, merge, nothing_seen
from kernels.prefix_attention_gpu import gpu_kernel
from kernels.prefix_attention_parts import Part, from_rows, may_attend, to_row_positions, to_rows
from kernels.prefix_attention_tpu import tpu_kernel
from kernels.shapes import pad_to


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
        q = to_rows(queries, len(lead))
        positions = to_row_positions(query_positions, len(lead), queries.shape[-2])
        visible = may_attend(
            positions[..., None, :, None], part.positions[..., None, None, :], window
        )
        state = absorb(nothing_seen(q.shape), q, part.keys, part.values, visible, softcap)
        states.append(State(*(from_rows(x, queries.shape)[None] for x in state)))
    return merge(states)


def _one_empty_slot(part: Part) -> Part:
    """A part of one slot in place of a part of none, which a kernel could not address."""
    return Part(
        keys=pad_to(part.keys, -2, 1, 0),
        values=pad_to(part.values, -2, 1, 0),
        positions=pad_to(part.positions, -1, 1, -1),
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
