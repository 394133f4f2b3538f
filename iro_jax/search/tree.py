"""Reading the tree of a search: from nodes back to answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from iro_jax.search.types import Candidates, Finalists, Scores, Trace


def take(x: Array, indices: Int[Array, "P N"]) -> Array:
    """`x[p, indices[p, n]]` for `x` of shape `[P, M, ...]`."""
    return jax.vmap(lambda rows, chosen: rows[chosen])(x, indices)


def append(
    tokens: Int[Array, "*lead H"],
    lengths: Int[Array, "*lead"],
    chunk: Int[Array, "*lead L"],
    chunk_lengths: Int[Array, "*lead"],
) -> Int[Array, "*lead H"]:
    """Writes chunks behind the ends of sequences; leading axes are broadcast."""
    place = jnp.arange(tokens.shape[-1]) - lengths[..., None]
    inside = (place >= 0) & (place < chunk_lengths[..., None])
    lead = jnp.broadcast_shapes(place.shape[:-1], chunk.shape[:-1])
    place = jnp.broadcast_to(jnp.clip(place, 0, chunk.shape[-1] - 1), (*lead, place.shape[-1]))
    chunk = jnp.broadcast_to(chunk, (*lead, chunk.shape[-1]))
    return jnp.where(inside, jnp.take_along_axis(chunk, place, axis=-1), tokens)


def sequences(candidates: Candidates) -> Int[Array, "P U H"]:
    """The whole answers of the candidates, zero after their ends."""
    beams, new = candidates.beams, candidates.new[..., None]
    extended = take(beams.tokens, candidates.rows)
    tokens = append(
        jnp.where(new, extended[:, :, None], beams.tokens[:, :, None]),
        candidates.lengths - candidates.chunk_lengths,
        candidates.tokens,
        candidates.chunk_lengths,
    )
    return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])


def ranking(totals: Float[Array, "P M"], valid: Bool[Array, "P M"]) -> Int[Array, "P M"]:
    """Indices by falling total, ties towards the lower index, invalid entries last."""
    return jnp.lexsort((-totals, ~valid), axis=-1).astype(jnp.int32)


def finalists(trace: Trace, nodes: Int[Array, "P M"], capacity: int) -> Finalists:
    """Rebuilds the answers that end in `nodes`; negative nodes are none.

    Works for any node of the tree, finished or not.

    Args:
      trace: of the search.
      nodes: the last chunk of each answer.
      capacity: H.
    """
    trace, nodes = jax.tree.map(jnp.asarray, (trace, nodes))
    num_steps, num_prompts = trace.parents.shape[:2]
    num_candidates = trace.num_candidates
    successors = trace.tokens.shape[3]
    valid = nodes >= 0

    def at(x: Array, step: Array, slot: Array) -> Array:
        """`x[step[p, m], p, slot[p, m]]` for `x` of shape `[S, P, slots, ...]`."""
        return x[step, jnp.arange(num_prompts)[:, None], slot]

    def of_candidates(x: Array) -> Array:
        return x.reshape(num_steps, num_prompts, num_candidates, *x.shape[4:])

    def on_path(current):
        return current // num_candidates, current % num_candidates

    def parents_of(current):
        step, slot = on_path(jnp.maximum(current, 0))
        return jnp.where(current >= 0, at(trace.parents, step, slot // successors), current)

    # From the leaves to the root: every step holds at most one node of a path.
    def walk(current, step):
        here = (current >= 0) & (current // num_candidates == step)
        return jnp.where(here, parents_of(current), current), jnp.where(here, current, -1)

    _, paths = lax.scan(walk, nodes, jnp.arange(num_steps), reverse=True)

    # Where each chunk of the path ends in the answer, and which chunk each place lies in.
    step, slot = jnp.arange(num_steps)[:, None, None], jnp.maximum(paths, 0) % num_candidates
    chunk_lengths = jnp.where(paths >= 0, at(of_candidates(trace.chunk_lengths), step, slot), 0)
    ends = jnp.moveaxis(jnp.cumsum(chunk_lengths, axis=0), 0, -1)
    places = jnp.arange(capacity)
    find = jax.vmap(jax.vmap(lambda end: jnp.searchsorted(end, places, side="right")))
    chunk = jnp.minimum(find(ends), num_steps - 1)
    starts = ends - jnp.moveaxis(chunk_lengths, 0, -1)
    offsets = places - jnp.take_along_axis(starts, chunk, axis=-1)
    slots = jnp.take_along_axis(jnp.moveaxis(slot, 0, -1), chunk, axis=-1)
    lengths = ends[..., -1]

    def unroll(x: Array) -> Array:
        """The chunks `[S, P, K, B, L]` of each answer, one behind the other."""
        prompt = jnp.arange(num_prompts)[:, None, None]
        inside = places < lengths[..., None]
        offset = jnp.where(inside, offsets, 0)
        return jnp.where(inside, of_candidates(x)[chunk, prompt, slots, offset], 0)

    step, slot = on_path(jnp.maximum(nodes, 0))
    parts = at(of_candidates(trace.scores.parts), step, slot)
    return Finalists(
        tokens=unroll(trace.tokens),
        lengths=lengths,
        ended=valid & at(of_candidates(trace.ended), step, slot),
        log_probs=unroll(trace.token_log_probs),
        scores=Scores(
            total=jnp.where(valid, at(of_candidates(trace.scores.total), step, slot), -jnp.inf),
            parts=jnp.where(valid[..., None], parts, 0.0),
        ),
        nodes=nodes,
        valid=valid,
    )
