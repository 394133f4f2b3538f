"""Guided generation: Algorithm 4 of arXiv 2506.17828, for any policy and any score.

    start with K copies of the prompt
    while some beam is unfinished:
        expand      every beam by B chunks of up to L tokens        expand_beams
        score       every candidate at its last token               select_beams
        keep K      of the K * B candidates as the next beams
    answer: the best of the finished candidates                     finish

The loop knows nothing of models: `expand_fn`, `score_fn` and `select_fn` come in, with the
parameters that they need. Nothing here is jitted and nothing touches the host; under
`jax.jit` a whole `search` is one program. `beam_step` is one turn of the loop, for callers
who want to look in between; `iro_jax.search.host` runs its halves with Python in between.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from iro_jax.search.selection import diversity_first
from iro_jax.search.tree import finalists, ranking, sequences, take
from iro_jax.search.types import (
    Beams,
    Candidates,
    Chunk,
    ExpandFn,
    Frontier,
    Pool,
    PyTree,
    Root,
    ScoreFn,
    Scores,
    SearchOutput,
    SearchState,
    SelectFn,
    Trace,
)


def search(
    params: PyTree,
    keys: Key[Array, " P"],
    root: Root,
    *,
    expand_fn: ExpandFn,
    score_fn: ScoreFn,
    select_fn: SelectFn = diversity_first,
    beam_width: int,
    num_successors: int,
    chunk_length: int,
    max_new_tokens: int | Int[Array, "*lead"],
    capacity: int | None = None,
    max_steps: int | None = None,
    reuse_finished: bool = False,
) -> SearchOutput:
    """Searches for the best answers to P prompts.

    Args:
      params: passed on to `expand_fn` and `score_fn`.
      keys: one key a prompt; everything random about its search comes from it.
      root: the prompts, as the two functions have read them.
      expand_fn: gives every beam its successors.
      score_fn: scores them.
      select_fn: chooses the next beams; see `iro_jax.search.selection`.
      beam_width: K.
      num_successors: B.
      chunk_length: L.
      max_new_tokens: longest answer in tokens; may be traced, and may differ between prompts.
      capacity: H, the static bound of `max_new_tokens`; by default `max_new_tokens` itself,
        which must then be an integer. Longer limits are cut to it.
      max_steps: most chunks of an answer, for functions whose chunks may be shorter than L;
        by default `ceil(capacity / chunk_length)`. Answers that need more are cut.
      reuse_finished: gives the successor slots of finished beams (but the first, in which
        they are carried) to unfinished ones in turn; by default they stay empty.

    Returns:
      The answers, ranked by score, with the tree they come from.

    Raises:
      ValueError: an empty batch, a size below one, or, where the values are known (outside
        `jax.jit`), a score that is NaN or infinite; see `check_scores`.
    """
    state = start(
        keys,
        root,
        beam_width=beam_width,
        num_successors=num_successors,
        chunk_length=chunk_length,
        max_new_tokens=max_new_tokens,
        capacity=capacity,
        max_steps=max_steps,
    )
    step = functools.partial(
        beam_step,
        params,
        keys,
        expand_fn=expand_fn,
        score_fn=score_fn,
        select_fn=select_fn,
        reuse_finished=reuse_finished,
    )
    output = finish(lax.while_loop(unfinished, step, state))
    if not isinstance(output.nonfinite, jax.core.Tracer):
        check_scores(output)
    return output


def beam_step(
    params: PyTree,
    keys: Key[Array, " P"],
    state: SearchState,
    *,
    expand_fn: ExpandFn,
    score_fn: ScoreFn,
    select_fn: SelectFn = diversity_first,
    reuse_finished: bool = False,
) -> SearchState:
    """One chunk: sampling, scoring and selection. The arguments are those of `search`."""
    candidates, state = expand_beams(
        params, keys, state, expand_fn=expand_fn, reuse_finished=reuse_finished
    )
    return select_beams(
        params,
        keys,
        state,
        candidates,
        score_fn=score_fn,
        select_fn=select_fn,
        reuse_finished=reuse_finished,
    )


def expand_beams(
    params: PyTree,
    keys: Key[Array, " P"],
    state: SearchState,
    *,
    expand_fn: ExpandFn,
    reuse_finished: bool = False,
) -> tuple[Candidates, SearchState]:
    """The first half of `beam_step`: the candidates, not yet scored."""
    _, width, successors = state.trace.new.shape[1:]
    rows = _rows(state.beams.finished, reuse_finished)
    prefixes = jax.tree.map(lambda x: take(x, rows), state.beams)
    # In the first slot. Integers are compared, because LLVM fails on eight booleans that XLA on
    # CPU broadcasts to 64, as it would with B = 8.
    carried = jnp.arange(successors) < state.beams.finished[..., None].astype(jnp.int32)
    frontier = Frontier(
        step=state.num_steps,
        beams=prefixes,
        open=~prefixes.finished[..., None] & ~carried,
        room=state.limit[:, None] - prefixes.lengths,
        memory=state.expand_memory,
    )
    chunk, memory = expand_fn(params, keys, frontier)
    _check_chunk(chunk, state.trace)
    new = frontier.open if chunk.valid is None else frontier.open & chunk.valid

    def successor_or_carried(successor, beam):
        return jnp.where(carried, beam[..., None], jnp.where(new, successor, 0))

    chunk_lengths = jnp.where(new, chunk.lengths, 0)
    real = jnp.arange(chunk.tokens.shape[-1]) < chunk_lengths[..., None]
    token_log_probs = jnp.where(real, chunk.log_probs, 0.0)
    lengths = prefixes.lengths[..., None] + chunk_lengths
    last = (state.num_steps == _last_step(state))[:, None, None]
    out_of_room = (chunk_lengths >= frontier.room[..., None]) | last
    first_node = state.num_steps[:, None, None] * width * successors
    nodes = first_node + jnp.arange(width * successors).reshape(width, -1)
    candidates = Candidates(
        beams=state.beams,
        rows=rows,
        tokens=jnp.where(real, chunk.tokens, 0),
        chunk_lengths=chunk_lengths,
        token_log_probs=token_log_probs,
        lengths=successor_or_carried(lengths, state.beams.lengths),
        ended=successor_or_carried(chunk.ended, state.beams.ended).astype(bool),
        finished=carried | (new & (chunk.ended | out_of_room)),
        log_probs=successor_or_carried(
            prefixes.log_probs[..., None] + token_log_probs.sum(-1), state.beams.log_probs
        ),
        nodes=successor_or_carried(nodes, state.beams.nodes),
        new=new,
        valid=new | carried,
        features=chunk.features,
        prompt_scores=state.prompt_scores,
    )
    return candidates, dataclasses.replace(state, expand_memory=memory)


def select_beams(
    params: PyTree,
    keys: Key[Array, " P"],
    state: SearchState,
    candidates: Candidates,
    *,
    score_fn: ScoreFn,
    select_fn: SelectFn = diversity_first,
    reuse_finished: bool = False,
) -> SearchState:
    """The second half of `beam_step`: scores the candidates and keeps K of them."""
    num_prompts, width, successors = candidates.new.shape
    scores, score_memory = score_fn(params, candidates, state.score_memory)
    chex.assert_equal_shape([scores.total, candidates.new])
    chex.assert_equal_shape([scores.parts, state.trace.scores.parts[0]])
    scores, nonfinite = _competing(scores, candidates)

    parents = select_fn(
        jax.vmap(_selection_key)(keys, state.num_steps),
        scores.total.reshape(num_prompts, -1),
        candidates,
    )
    chex.assert_shape(parents, (num_prompts, width))
    over = done(state)
    carried_slots = jnp.arange(width) * successors
    parents = jnp.where(over[:, None], carried_slots, parents).astype(jnp.int32)

    def selected(x):
        return take(x.reshape(num_prompts, width * successors, *x.shape[3:]), parents)

    beams = Beams(
        tokens=take(sequences(candidates), parents),
        lengths=selected(candidates.lengths),
        ended=selected(candidates.ended),
        finished=selected(candidates.finished),
        log_probs=selected(candidates.log_probs),
        scores=jax.tree.map(selected, scores),
        nodes=selected(candidates.nodes),
    )
    rows = _rows(beams.finished, reuse_finished)
    commit = functools.partial(_commit, parents=take(parents, rows))
    return SearchState(
        limit=state.limit,
        prompt_scores=state.prompt_scores,
        beams=beams,
        pool=_remember(state.pool, beams, entering=beams.finished & selected(candidates.new)),
        trace=_record(state.trace, state.num_steps, over, candidates, scores, parents),
        expand_memory=commit(state.expand_memory),
        score_memory=commit(score_memory),
        num_steps=state.num_steps + ~over,
        num_tokens=state.num_tokens + candidates.chunk_lengths.sum((1, 2)),
        num_queries=state.num_queries + scores.parts.shape[-1] * candidates.new.sum((1, 2)),
        nonfinite=state.nonfinite | nonfinite,
    )


def start(
    keys: Key[Array, " P"],
    root: Root,
    *,
    beam_width: int,
    num_successors: int,
    chunk_length: int,
    max_new_tokens: int | Int[Array, "*lead"],
    capacity: int | None = None,
    max_steps: int | None = None,
) -> SearchState:
    """The state before the first chunk: every beam is the bare prompt. See `search`."""
    if capacity is None:
        if not isinstance(max_new_tokens, int):
            raise ValueError("A max_new_tokens that is not an int needs a static capacity")
        capacity = max_new_tokens
    sizes = {
        "beam_width": beam_width,
        "num_successors": num_successors,
        "chunk_length": chunk_length,
        "capacity": capacity,
    }
    if isinstance(max_new_tokens, int):
        sizes = {"max_new_tokens": max_new_tokens} | sizes
    if max_steps is None:
        max_steps = -(-max(capacity, 0) // max(chunk_length, 1))
    sizes["max_steps"] = max_steps
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1. Got: {size}")
    if keys.ndim != 1 or keys.shape[0] < 1:
        raise ValueError(f"A search needs one key for each prompt. Got: keys of {keys.shape}")
    num_prompts = keys.shape[0]
    chex.assert_shape(root.scores.total, (num_prompts,))

    lead = (num_prompts, beam_width)
    per_step = (max_steps, *lead, num_successors)
    num_candidates = beam_width * num_successors
    num_scores = root.scores.parts.shape[-1]

    def on_beams(x):
        return jnp.broadcast_to(x[:, None], (*lead, *x.shape[1:])).astype(jnp.float32)

    limit = jnp.minimum(jnp.asarray(max_new_tokens, jnp.int32), capacity)
    return SearchState(
        limit=jnp.broadcast_to(limit, (num_prompts,)),
        prompt_scores=root.scores.total.astype(jnp.float32),
        beams=Beams(
            tokens=jnp.zeros((*lead, capacity), jnp.int32),
            lengths=jnp.zeros(lead, jnp.int32),
            ended=jnp.zeros(lead, bool),
            finished=jnp.zeros(lead, bool),
            log_probs=jnp.zeros(lead, jnp.float32),
            scores=jax.tree.map(on_beams, root.scores),
            nodes=jnp.full(lead, Trace.ROOT, jnp.int32),
        ),
        pool=Pool(
            nodes=jnp.full((num_prompts, num_candidates), Pool.EMPTY, jnp.int32),
            totals=jnp.full((num_prompts, num_candidates), -jnp.inf, jnp.float32),
        ),
        trace=Trace(
            parents=jnp.full((max_steps, *lead), Trace.ROOT, jnp.int32),
            tokens=jnp.zeros((*per_step, chunk_length), jnp.int32),
            token_log_probs=jnp.zeros((*per_step, chunk_length), jnp.float32),
            chunk_lengths=jnp.zeros(per_step, jnp.int32),
            ended=jnp.zeros(per_step, bool),
            finished=jnp.zeros(per_step, bool),
            new=jnp.zeros(per_step, bool),
            scores=Scores(
                total=jnp.full(per_step, -jnp.inf, jnp.float32),
                parts=jnp.zeros((*per_step, num_scores), jnp.float32),
            ),
            selected=jnp.zeros((max_steps, *lead), jnp.int32),
        ),
        expand_memory=root.expand_memory,
        score_memory=root.score_memory,
        num_steps=jnp.zeros(num_prompts, jnp.int32),
        num_tokens=jnp.zeros(num_prompts, jnp.int32),
        num_queries=jnp.zeros(num_prompts, jnp.int32),
        nonfinite=jnp.zeros(num_prompts, bool),
    )


def unfinished(state: SearchState) -> Bool[Array, ""]:
    """Whether some beam of some prompt can still grow."""
    return ~jnp.all(done(state))


def done(state: SearchState) -> Bool[Array, " P"]:
    """Of which prompts every beam is finished."""
    return jnp.all(state.beams.finished, axis=-1) | (state.num_steps > _last_step(state))


def finish(state: SearchState) -> SearchOutput:
    """The answers of a search whose beams are finished."""
    trace = state.trace
    num_prompts, num_candidates = state.pool.nodes.shape
    last = jnp.maximum(state.num_steps - 1, 0)

    def last_set(x):
        return jax.vmap(lambda of_prompt, step: of_prompt[step], (1, 0))(x, last).reshape(
            num_prompts, num_candidates
        )

    # A finished candidate of the last set is in the pool already if it was ever selected.
    nodes = last[:, None] * num_candidates + jnp.arange(num_candidates)
    pooled = jnp.any(nodes[..., None] == state.pool.nodes[:, None], axis=-1)
    rest = last_set(trace.new) & last_set(trace.finished) & ~pooled
    # And one that the full pool has lost may be among the beams that were carried.
    lost = state.beams.finished & ~jnp.any(
        state.beams.nodes[..., None] == state.pool.nodes[:, None], axis=-1
    )
    everything = jnp.concatenate(
        [
            state.pool.nodes,
            jnp.where(rest, nodes, Pool.EMPTY),
            jnp.where(_first_of_its_kind(state.beams.nodes) & lost, state.beams.nodes, Pool.EMPTY),
        ],
        axis=-1,
    )
    capacity = state.beams.tokens.shape[-1]
    answers = finalists(trace, everything, capacity)
    order = ranking(answers.scores.total, answers.valid)
    return SearchOutput(
        finalists=answers,
        ranking=order,
        best=order[:, 0],
        beams=finalists(trace, state.beams.nodes, capacity),
        trace=trace,
        num_steps=state.num_steps,
        num_tokens=state.num_tokens,
        num_queries=state.num_queries,
        nonfinite=state.nonfinite,
    )


def check_scores(output: SearchOutput, first: int = 0) -> None:
    """Raises a ValueError that names the prompts of which a score was NaN or infinite.

    Args:
      first: the number of the output's first prompt.
    """
    bad = [first + int(index) for index in jnp.flatnonzero(output.nonfinite)]
    if bad:
        raise ValueError(
            "A score was NaN or infinite (look for NaN in the value functions' weights and for"
            f" betas of zero). Got: such scores in prompts {bad} of the batch"
        )


def _rows(finished: Bool[Array, "P K"], reuse_finished: bool) -> Int[Array, "P K"]:
    """Which beam each row extends: its own, or in place of a finished one another's."""
    own = jnp.broadcast_to(jnp.arange(finished.shape[-1]), finished.shape)
    if not reuse_finished:
        return own
    live_first = jnp.argsort(finished, axis=-1, stable=True)
    num_live = jnp.sum(~finished, axis=-1, keepdims=True)
    turn = (jnp.cumsum(finished, axis=-1) - 1) % jnp.maximum(num_live, 1)
    donors = jnp.take_along_axis(live_first, turn, axis=-1)
    return jnp.where(finished & (num_live > 0), donors, own)


def _last_step(state: SearchState) -> int:
    return state.trace.parents.shape[0] - 1


def _selection_key(key: Key[Array, ""], step: Int[Array, ""]) -> Key[Array, ""]:
    # Draws of tokens fold their positions into the key; no position is as large as this.
    return jax.random.fold_in(jax.random.fold_in(key, 0xFFFFFFFF), step)


def _check_chunk(chunk: Chunk, trace: Trace) -> None:
    shape = trace.tokens.shape[1:]
    if chunk.tokens.shape != shape:
        raise ValueError(
            "expand_fn must return chunks of shape [prompts, beam_width, num_successors,"
            f" chunk_length] = {list(shape)}. Got: {list(chunk.tokens.shape)}"
        )
    chex.assert_shape([chunk.lengths, chunk.ended], shape[:-1])
    chex.assert_shape(chunk.log_probs, shape)


def _competing(scores: Scores, candidates: Candidates) -> tuple[Scores, Bool[Array, " P"]]:
    """New candidates with their scores, carried ones with their beams', and what was wrong."""
    new, beams = candidates.new, candidates.beams
    carried = candidates.valid & ~new
    total = jnp.where(new, scores.total.astype(jnp.float32), beams.scores.total[..., None])
    parts = jnp.where(new[..., None], scores.parts, beams.scores.parts[:, :, None])
    finite = jnp.isfinite(total) & jnp.all(jnp.isfinite(parts), axis=-1)
    competing = (new & finite) | carried
    cleaned = Scores(
        total=jnp.where(competing, total, -jnp.inf),
        parts=jnp.where(candidates.valid[..., None], parts.astype(jnp.float32), 0.0),
    )
    return cleaned, jnp.any(new & ~finite, axis=(1, 2))


def _first_of_its_kind(nodes: Int[Array, "P K"]) -> Bool[Array, "P K"]:
    same = nodes[:, :, None] == nodes[:, None]
    return ~jnp.any(jnp.tril(same, -1), axis=-1)


def _remember(pool: Pool, beams: Beams, entering: Bool[Array, "P K"]) -> Pool:
    """Adds newly finished beams; when the pool is full, the best stay."""
    entering &= _first_of_its_kind(beams.nodes)
    nodes = jnp.concatenate([pool.nodes, jnp.where(entering, beams.nodes, Pool.EMPTY)], axis=-1)
    totals = jnp.concatenate(
        [pool.totals, jnp.where(entering, beams.scores.total, -jnp.inf)], axis=-1
    )
    order = ranking(totals, nodes != Pool.EMPTY)[:, : pool.nodes.shape[-1]]
    return Pool(nodes=take(nodes, order), totals=take(totals, order))


def _record(
    trace: Trace,
    step: Int[Array, " P"],
    over: Bool[Array, " P"],
    candidates: Candidates,
    scores: Scores,
    selected: Int[Array, "P K"],
) -> Trace:
    now = Trace(
        parents=take(candidates.beams.nodes, candidates.rows),
        tokens=candidates.tokens,
        token_log_probs=candidates.token_log_probs,
        chunk_lengths=candidates.chunk_lengths,
        ended=candidates.ended,
        finished=candidates.finished,
        new=candidates.new,
        scores=scores,
        selected=selected,
    )
    # What is over is not written anywhere.
    step = jnp.where(over, trace.parents.shape[0], step)
    prompts = jnp.arange(step.shape[0])
    return jax.tree.map(
        lambda steps, one: steps.at[step, prompts].set(one, mode="drop", unique_indices=True),
        trace,
        now,
    )


def _commit(memory: PyTree, parents: Int[Array, "P K"]) -> PyTree:
    def has_commit(node):
        return hasattr(node, "commit")

    return jax.tree.map(
        lambda node: node.commit(parents) if has_commit(node) else node,
        memory,
        is_leaf=has_commit,
    )
