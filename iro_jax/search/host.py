"""The same search with Python between its halves.

For what a compiled program cannot do on every platform: a policy behind an API, a reward in
Python, a tokenizer. `HostSearch` runs the halves of `beam_step` in turn, each as one program,
and lets functions on the host see the candidates in between. Same state, same answers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Int, Key

from iro_jax.search.search import (
    check_scores,
    expand_beams,
    finish,
    select_beams,
    start,
    unfinished,
)
from iro_jax.search.selection import diversity_first
from iro_jax.search.types import (
    Candidates,
    ExpandFn,
    PyTree,
    Root,
    ScoreFn,
    SearchOutput,
    SearchState,
    SelectFn,
)

ObserveFn = Callable[[Candidates, PyTree], Any]
"""From candidates and the memory of `score_fn` to new `features`.

Both are on the device: the function fetches what it needs of them.
"""


class HostSearch:
    """A search that is driven from Python; compiled once for each shape of its arguments.

    Args:
      expand_fn, score_fn, select_fn: as in `search`.
      observe_fn: looks at the candidates before they are scored; what it returns becomes
        their `features`, where `score_fn` finds it.
      expand_on_host: `expand_fn` is Python that cannot be compiled.
      beam_width, num_successors, chunk_length, capacity, max_steps, reuse_finished: as in
        `search`.
    """

    def __init__(
        self,
        *,
        expand_fn: ExpandFn,
        score_fn: ScoreFn,
        select_fn: SelectFn = diversity_first,
        observe_fn: ObserveFn | None = None,
        expand_on_host: bool = False,
        beam_width: int,
        num_successors: int,
        chunk_length: int,
        capacity: int,
        max_steps: int | None = None,
        reuse_finished: bool = False,
    ):
        self.capacity = capacity
        self._observe = observe_fn
        expand = functools.partial(expand_beams, expand_fn=expand_fn, reuse_finished=reuse_finished)
        select = functools.partial(
            select_beams, score_fn=score_fn, select_fn=select_fn, reuse_finished=reuse_finished
        )
        self._start = functools.partial(
            start,
            beam_width=beam_width,
            num_successors=num_successors,
            chunk_length=chunk_length,
            capacity=capacity,
            max_steps=max_steps,
        )
        self._expand = expand if expand_on_host else jax.jit(expand, donate_argnums=2)
        self._select = jax.jit(select, donate_argnums=2)
        self._unfinished = jax.jit(unfinished)
        self._finish = jax.jit(finish)

    def __call__(
        self,
        params: PyTree,
        keys: Key[Array, " P"],
        root: Root,
        *,
        max_new_tokens: int | Int[Array, "*lead"] | None = None,
        on_step: Callable[[SearchState], None] | None = None,
        check: bool = True,
    ) -> SearchOutput:
        """Searches. The root's arrays are consumed: the state of the search takes their place.

        Args:
          max_new_tokens: longest answer, at most `capacity`, which is the default.
          on_step: sees the state after every chunk, for example to show progress.
          check: whether to raise if a score was NaN or infinite.

        Raises:
          ValueError: as `search` does, and a score that is NaN or infinite.
        """
        limit = self.capacity if max_new_tokens is None else max_new_tokens
        state = self._start(keys, root, max_new_tokens=limit)
        while bool(self._unfinished(state)):
            candidates, state = self._expand(params, keys, state)
            if self._observe is not None:
                features = self._observe(candidates, state.score_memory)
                candidates = dataclasses.replace(candidates, features=features)
            state = self._select(params, keys, state, candidates)
            if on_step is not None:
                on_step(state)
        output = self._finish(state)
        if check:
            check_scores(output)
        return output
