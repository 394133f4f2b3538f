"""Comparing methods: against all subsets, and against counting by hand."""

import itertools

import numpy as np
import pytest

from iro_jax.evaluation import best_of_n_divergence, distinct_n, expected_best, wins


def test_ties_are_half_a_win():
    assert wins([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_expected_best_is_the_mean_over_all_subsets(n):
    rewards = [0.3, -1.0, 2.0, 0.3, 5.0, -2.0]
    subsets = list(itertools.combinations(rewards, n))
    assert expected_best(rewards, n) == pytest.approx(np.mean([max(some) for some in subsets]))


def test_the_expected_best_of_more_than_there_are():
    with pytest.raises(ValueError, match=r"n must be in 1\.\.2.*Got: 3"):
        expected_best([1.0, 2.0], 3)


def test_distinct_n_counts_word_sequences():
    texts = ["a b a b", "a b"]  # ab, ba, ab; ab
    assert distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)
    assert distinct_n(["one"], 2) == 0.0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_divergence_of_best_of_n_is_the_bound_where_rewards_differ(n):
    """On a uniform policy over many answers, whose best-of-n is known."""
    size = 20_000
    cumulated = np.arange(1, size + 1) / size
    best = cumulated**n - (cumulated - 1 / size) ** n
    divergence = float(np.sum(best * np.log(best * size)))
    assert divergence == pytest.approx(best_of_n_divergence(n), abs=1e-3)
