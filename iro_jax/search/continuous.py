"""Continuous batching: a prompt that is done makes room for the next one.

`ContinuousSearch` drives `beam_step` from Python. After every chunk, the prompts of the batch of
which every beam is finished leave it, and waiting ones take their rows: long answers do not hold
the others up. Shapes are fixed, four programs serve any number of prompts, and every prompt gets
the answers that it gets in `search`, whatever its neighbours.

    start    a full batch of prompts                     once, and when all are done together
    step     one chunk for every row                     `beam_step`
    finish   the answers of some rows
    admit    one prompt into a row
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from iro_jax.search.search import beam_step, done, finish, start
from iro_jax.search.selection import diversity_first
from iro_jax.search.types import (
    ExpandFn,
    PyTree,
    Root,
    ScoreFn,
    SearchOutput,
    SearchState,
    SelectFn,
)

_NOBODY = -1

RootFn = Callable[..., Root]
"""From parameters and arrays of prompts, `[P, ...]`, to their root."""


def admit(state: SearchState, rows: Int[Array, " A"], newcomers: SearchState) -> SearchState:
    """The state with A prompts that begin in the place of those in `rows`.

    Args:
      state: of P prompts, between two chunks.
      rows: different ones.
      newcomers: what `start` has made of the A prompts; their other sizes are those of `state`.

    Raises:
      TypeError: a memory of the search has `commit` but no `admit`.
    """

    def into_rows(x: Array, y: Array) -> Array:
        return x.at[rows].set(y, unique_indices=True)

    def into_memory(memory: Any, other: Any) -> Any:
        if hasattr(memory, "admit"):
            return memory.admit(rows, other)
        if hasattr(memory, "commit"):
            raise TypeError(f"{type(memory).__name__} has no `admit`: it cannot take prompts in")
        return into_rows(memory, other)

    changed = {
        field.name: jax.tree.map(
            into_memory,
            getattr(state, field.name),
            getattr(newcomers, field.name),
            is_leaf=lambda node: hasattr(node, "commit"),
        )
        for field in dataclasses.fields(state)
        if field.name != "trace"
    }
    trace = jax.tree.map(
        lambda x, y: x.at[:, rows].set(y, unique_indices=True), state.trace, newcomers.trace
    )
    return SearchState(**changed, trace=trace)


def outputs_of(state: SearchState, rows: Int[Array, " A"]) -> SearchOutput:
    """The answers of some prompts of a state."""
    trace = jax.tree.map(lambda x: x[:, rows], state.trace)
    chosen = {
        field.name: jax.tree.map(lambda x: x[rows], getattr(state, field.name))
        for field in dataclasses.fields(state)
        if field.name not in ("trace", "expand_memory", "score_memory")
    }
    return finish(SearchState(**chosen, trace=trace, expand_memory=None, score_memory=None))


class ContinuousSearch:
    """Searches for the answers to many prompts, so many together.

    Args:
      root_fn: reads prompts; compiled for one prompt and for a batch of them.
      expand_fn, score_fn, select_fn: as in `search`; what they remember can `admit`.
      batch_size: P.
      beam_width, num_successors, chunk_length, capacity, max_steps, reuse_finished: as in
        `search`.
    """

    def __init__(
        self,
        *,
        root_fn: RootFn,
        expand_fn: ExpandFn,
        score_fn: ScoreFn,
        select_fn: SelectFn = diversity_first,
        batch_size: int,
        beam_width: int,
        num_successors: int,
        chunk_length: int,
        capacity: int,
        max_steps: int | None = None,
        reuse_finished: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1. Got: {batch_size}")
        self.batch_size = batch_size
        begin = functools.partial(
            start,
            beam_width=beam_width,
            num_successors=num_successors,
            chunk_length=chunk_length,
            capacity=capacity,
            max_steps=max_steps,
        )

        def first(params: PyTree, keys: Key[Array, " P"], prompts: PyTree, limit: Array):
            return begin(keys, root_fn(params, *prompts), max_new_tokens=limit)

        def step(params: PyTree, keys: Key[Array, " P"], state: SearchState):
            state = beam_step(
                params,
                keys,
                state,
                expand_fn=expand_fn,
                score_fn=score_fn,
                select_fn=select_fn,
                reuse_finished=reuse_finished,
            )
            return state, done(state)

        def enter(params, keys, state, row, key, prompt, limit):
            row = jnp.asarray(row, jnp.int32)
            newcomer = first(params, key[None], jax.tree.map(lambda x: x[None], prompt), limit)
            return keys.at[row].set(key), admit(state, row[None], newcomer)

        self._start = jax.jit(first)
        self._step = jax.jit(step, donate_argnums=2)
        self._admit = jax.jit(enter, donate_argnums=(1, 2))
        self._outputs = jax.jit(lambda state, row: outputs_of(state, row[None]))

    def __call__(
        self,
        params: PyTree,
        keys: Key[Array, " N"],
        prompts: Sequence[PyTree],
        *,
        max_new_tokens: int,
    ) -> Iterator[tuple[int, SearchOutput]]:
        """Searches for the answers to N prompts.

        Args:
          keys: of the prompts.
          prompts: arrays of N prompts each, the further arguments of `root_fn`.
          max_new_tokens: longest answer.

        Yields:
          The number of a prompt and its answers, on the host, a batch of one; in the order in which
          they are done.
        """
        number = keys.shape[0]
        prompts = jax.tree.map(np.asarray, prompts)

        def take(chosen: Any) -> tuple[Array, PyTree]:
            return keys[chosen], jax.tree.map(lambda x: jnp.asarray(x[chosen]), prompts)

        first = 0  # of those that wait
        in_row = np.full(self.batch_size, _NOBODY)
        while first < number or (in_row != _NOBODY).any():
            if (in_row == _NOBODY).all():
                in_row = first + np.arange(self.batch_size)
                real, first = in_row < number, min(first + self.batch_size, number)
                # Rows that fill the batch up must not keep it waiting.
                limit = np.where(real, max_new_tokens, 1).astype(np.int32)
                of_rows, batch = take(np.minimum(in_row, number - 1))
                in_row = np.where(real, in_row, _NOBODY)
                state = self._start(params, of_rows, batch, limit)
            state, over = self._step(params, of_rows, state)
            for row in np.flatnonzero(np.asarray(over) & (in_row != _NOBODY)):
                yield int(in_row[row]), jax.device_get(self._outputs(state, row))
                in_row[row] = _NOBODY
            if (in_row == _NOBODY).all():
                continue  # a batch that starts together reads its prompts together
            for row in np.flatnonzero(in_row == _NOBODY)[: number - first]:
                of_rows, state = self._admit(
                    params, of_rows, state, row, *take(first), np.int32(max_new_tokens)
                )
                in_row[row], first = first, first + 1
