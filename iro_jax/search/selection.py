"""Which K of the U candidates become the next beams.

Every function has the signature of `SelectFn`: keys `[P]`, scores `[P, U]` (-inf where there
is no candidate) and the candidates come in, K indices of each prompt come out, `[P, K]`.
Options are bound with `functools.partial`. Ties break towards the lower index. Two families:

    beam search   diversity_first, top_k, per_parent, stochastic
    sampling      softmax_per_parent draws from pi_t of equation (6), normalised in every
                  state; resample from pi_base(y) exp(V(y)), tilted once for the whole answer
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from iro_jax.search.tree import ranking, sequences, take
from iro_jax.search.types import Candidates, Scores, SelectFn


def diversity_first(
    keys: Key[Array, " P"], scores: Float[Array, "P U"], candidates: Candidates
) -> Int[Array, "P K"]:
    """The best of each group of identical answers, then the best duplicates.

    Algorithm 5; the maximiser of equation (9) when lambda is large.
    """
    del keys
    order = ranking(scores, _flat(candidates.valid))
    rank = jnp.argsort(order, axis=-1)
    better = rank[:, None, :] < rank[:, :, None]
    duplicate = jnp.any(_identical(candidates) & better, axis=-1)
    by_group = jnp.lexsort((rank, duplicate, ~_flat(candidates.valid)), axis=-1)
    return by_group[:, : _width(candidates)]


def top_k(
    keys: Key[Array, " P"], scores: Float[Array, "P U"], candidates: Candidates
) -> Int[Array, "P K"]:
    """The K best, duplicates or not."""
    del keys
    return ranking(scores, _flat(candidates.valid))[:, : _width(candidates)]


def per_parent(
    keys: Key[Array, " P"], scores: Float[Array, "P U"], candidates: Candidates
) -> Int[Array, "P K"]:
    """The best of each row's successors: K independent searches."""
    del keys
    return _best_of_rows(scores, candidates)


def stochastic(
    keys: Key[Array, " P"],
    scores: Float[Array, "P U"],
    candidates: Candidates,
    temperature: float = 1.0,
) -> Int[Array, "P K"]:
    """K draws without replacement from softmax(scores / temperature).

    Drawn as the K largest of `scores / temperature` plus Gumbel noise.
    """
    noisy = scores / temperature + _gumbel(keys, scores)
    return ranking(noisy, _flat(candidates.valid))[:, : _width(candidates)]


def softmax_per_parent(
    keys: Key[Array, " P"],
    scores: Float[Array, "P U"],
    candidates: Candidates,
    temperature: float = 1.0,
) -> Int[Array, "P K"]:
    """One draw for each row from the softmax of its successors' scores / temperature.

    With L = 1 and successors from pi_base this is self-normalised importance sampling of
    pi_base(a|s) exp(V([s, a])): as B grows, each row is a sample of pi_t (equation 6).
    """
    return _best_of_rows(scores / temperature + _gumbel(keys, scores), candidates)


def resample(
    keys: Key[Array, " P"], scores: Float[Array, "P U"], candidates: Candidates
) -> Int[Array, "P K"]:
    """Particles: K draws with replacement, in proportion to exp(V(new) - V(old)).

    The increments of the score telescope, so that the beams approach
    pi_base(y) exp(V(y)) / Z as K grows. Each beam is one particle whose successors share its
    weight; a finished one has a single successor, itself. The draws are systematic: their
    expected numbers are exact and vary by less than one.
    """
    width = _width(candidates)
    new = _flat(candidates.new)
    old = take(candidates.beams.scores.total, candidates.rows)[..., None]
    old = jnp.broadcast_to(old, candidates.new.shape)
    increments = jnp.where(new, scores - _flat(old), 0.0)
    parents = jnp.where(candidates.new, candidates.rows[..., None], jnp.arange(width)[:, None])
    parents, valid = _flat(parents), _flat(candidates.valid)
    counts = jax.vmap(lambda p, v: jnp.zeros(width).at[p].add(v))(parents, valid)
    siblings = jnp.take_along_axis(counts, parents, axis=-1)
    possible = valid & jnp.isfinite(scores)
    log_weights = jnp.where(possible, increments - jnp.log(siblings), -jnp.inf)
    return jax.vmap(_systematic, (0, 0, None))(keys, jax.nn.softmax(log_weights), width)


def with_log_probs(select_fn: SelectFn, weight: float = 1.0) -> SelectFn:
    """Adds the policy's log-probability of the answer so far to the scores.

    Equation (8) for candidates that were not sampled from the policy. The reported scores
    stay without it.
    """

    def select(keys, scores, candidates):
        beams = candidates.beams
        prefix = beams.scores.total + weight * beams.log_probs
        beams = dataclasses.replace(beams, scores=Scores(prefix, beams.scores.parts))
        return select_fn(
            keys,
            scores + weight * _flat(candidates.log_probs),
            dataclasses.replace(candidates, beams=beams),
        )

    return select


def _flat(x: Array) -> Array:
    return x.reshape(x.shape[0], -1)


def _width(candidates: Candidates) -> int:
    return candidates.valid.shape[1]


def _identical(candidates: Candidates) -> Bool[Array, "P U U"]:
    """Which candidates are the same tokens, invalid ones excepted."""
    tokens = sequences(candidates)
    lengths, valid = _flat(candidates.lengths), _flat(candidates.valid)
    return (
        jnp.all(tokens[:, :, None] == tokens[:, None], axis=-1)
        & (lengths[:, :, None] == lengths[:, None])
        & valid[:, :, None]
        & valid[:, None]
    )


def _best_of_rows(scores: Float[Array, "P U"], candidates: Candidates) -> Int[Array, "P K"]:
    of_rows = scores.reshape(candidates.valid.shape)
    order = jnp.lexsort((-of_rows, ~candidates.valid), axis=-1)
    return jnp.arange(_width(candidates)) * of_rows.shape[-1] + order[..., 0]


def _gumbel(keys: Key[Array, " P"], scores: Float[Array, "P U"]) -> Float[Array, "P U"]:
    return jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)


def _systematic(
    key: Key[Array, ""], weights: Float[Array, " U"], count: int
) -> Int[Array, " count"]:
    """One uniform number places a comb of `count` teeth over the cumulated weights."""
    # A parallel sum may rise by rounding where a weight is zero; nothing may be drawn there.
    cumulated = lax.cummax(jnp.where(weights > 0, jnp.cumsum(weights), 0.0))
    teeth = (jnp.arange(count) + jax.random.uniform(key)) / count * cumulated[-1]
    teeth = jnp.minimum(teeth, jnp.nextafter(cumulated[-1], 0.0))
    return jnp.searchsorted(cumulated, teeth, side="right")
