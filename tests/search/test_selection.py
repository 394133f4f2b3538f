"""Selections alone, on candidates made by hand."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iro_jax import search as s
from tests.search.tabular import keys


def candidates_of(tokens, width, *, valid=None, log_probs=None):
    """One prompt's first candidates: chunks of one token, `tokens` `[U]`."""
    successors = len(tokens) // width
    lead = (1, width, successors)
    ones = jnp.ones(lead, jnp.int32)
    scores = s.Scores(jnp.zeros((1, width)), jnp.zeros((1, width, 0)))
    none = jnp.zeros((1, width), bool)
    beams = s.Beams(
        tokens=jnp.zeros((1, width, 4), jnp.int32),
        lengths=jnp.zeros((1, width), jnp.int32),
        ended=none,
        finished=none,
        log_probs=jnp.zeros((1, width)),
        scores=scores,
        nodes=jnp.full((1, width), s.Trace.ROOT),
    )
    exists = jnp.ones(lead, bool) if valid is None else jnp.asarray(valid).reshape(lead)
    return s.Candidates(
        beams=beams,
        rows=jnp.arange(width)[None],
        tokens=jnp.asarray(tokens).reshape(*lead, 1),
        chunk_lengths=ones,
        token_log_probs=jnp.zeros((*lead, 1)),
        lengths=ones,
        ended=jnp.zeros(lead, bool),
        finished=jnp.zeros(lead, bool),
        log_probs=jnp.zeros(lead) if log_probs is None else jnp.asarray(log_probs).reshape(lead),
        nodes=jnp.arange(len(tokens)).reshape(lead),
        new=exists,
        valid=exists,
        features=None,
        prompt_scores=jnp.zeros(1),
    )


def select(select_fn, scores, candidates):
    return select_fn(keys(1), jnp.asarray([scores], jnp.float32), candidates)[0].tolist()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    values=st.lists(st.integers(-3, 3), min_size=5, max_size=5),
)
def test_diversity_first_maximises_equation_9(tokens, values):
    """Identical candidates have equal values; lambda exceeds any difference of the sums."""
    scores, width = [float(values[token]) for token in tokens], 3

    def objective(chosen):
        return 100.0 * len({tokens[i] for i in chosen}) + sum(scores[i] for i in chosen)

    chosen = select(s.diversity_first, scores, candidates_of(tokens, width))
    assert len(set(chosen)) == width
    best = max(objective(subset) for subset in itertools.combinations(range(6), width))
    assert objective(chosen) == best


def test_the_best_of_a_group_comes_first_and_duplicates_fill_up():
    candidates = candidates_of([7, 7, 8, 7], 2)
    assert select(s.diversity_first, [1.0, 3.0, 0.0, 2.0], candidates) == [1, 2]
    candidates = candidates_of([7, 7, 7, 8, 7, 7, 7, 7, 7], 3)
    scores = [1.0, 5.0, 3.0, 0.0, 3.0, 2.0, 1.0, 1.0, 1.0]
    assert select(s.diversity_first, scores, candidates) == [1, 3, 2]
    assert select(s.top_k, scores, candidates) == [1, 2, 4]


def test_ties_break_towards_the_lower_index():
    candidates = candidates_of([1, 2, 3, 4], 2)
    for select_fn in (s.diversity_first, s.top_k):
        assert select(select_fn, [0.0, 1.0, 1.0, 1.0], candidates) == [1, 2]
    assert select(s.per_parent, [1.0, 1.0, 2.0, 2.0], candidates) == [0, 2]


@pytest.mark.parametrize(
    "select_fn",
    [s.diversity_first, s.top_k, s.per_parent, s.stochastic, s.softmax_per_parent, s.resample],
)
def test_what_does_not_exist_is_not_chosen(select_fn):
    valid = [False, True, True, False, False, True]
    candidates = candidates_of([1, 2, 3, 4, 5, 6], 3, valid=valid)
    scores = [-np.inf if not exists else -1e3 * i for i, exists in enumerate(valid)]
    candidates_chosen = select(select_fn, scores, candidates)
    assert all(valid[i] for i in candidates_chosen)
    if select_fn is not s.resample:
        assert sorted(candidates_chosen) == [1, 2, 5]


def test_log_probabilities_can_be_added():
    candidates = candidates_of([1, 2, 3, 4], 1, log_probs=[-5.0, -0.1, -3.0, -4.0])
    scores = [4.0, 0.0, 3.5, 0.0]
    assert select(s.top_k, scores, candidates) == [0]
    assert select(s.with_log_probs(s.top_k), scores, candidates) == [2]
    assert select(s.with_log_probs(s.top_k, weight=10.0), scores, candidates) == [1]


def test_resampling_counts_are_within_one_of_their_expectation():
    candidates = candidates_of(list(range(8)), 8)
    weights = np.array([0.05, 0.3, 0.0, 0.15, 0.1, 0.2, 0.05, 0.15])
    with np.errstate(divide="ignore"):
        scores = np.log(weights)
    counts = np.bincount(select(s.resample, scores, candidates), minlength=8)
    assert (np.abs(counts - 8 * weights) < 1).all()
    assert counts[2] == 0
