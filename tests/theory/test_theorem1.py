"""Theorem 1 on random trees with exact values: J never falls, the best iterate keeps its bound.

beta_t = sqrt(t + 1)/omega, omega for the T that is run and for each tree's own C_ST. T is in the
thousands: below that the bound is above the largest reward, and nothing could break it.
"""

import numpy as np
import pytest

from iro_jax.exact import (
    AnswerTree,
    expected_rewards,
    hard_trees,
    random_trees,
    theorem_1_bound,
)
from iro_jax.schedules import betas

TREES = 4  # of each of these shapes
SHAPES = [(vocabulary, horizon) for vocabulary in (2, 3, 4) for horizon in (2, 3, 4)]
R_MAX = {2: 0.5, 3: 1.0, 4: 6.0}  # by horizon


def trees_of(vocabulary, horizon):
    """Rewards in [0, r_max], graded and binary in turn; token 0 ends answers in half the shapes."""
    has_eos = (vocabulary + horizon) % 2 == 1
    seed = 10 * vocabulary + horizon
    trees = random_trees(seed, TREES, vocabulary, horizon, has_eos=has_eos)
    return AnswerTree(trees.log_policy, R_MAX[horizon] * trees.rewards)


def theorem_betas(trees, r_max, num_iterations):
    """`[T, trees]`."""
    return np.transpose(
        [
            betas({"name": "theorem", "log_concentrability": log_c, "r_max": r_max}, num_iterations)
            for log_c in trees.log_concentrability
        ]
    )


def enough_iterations(trees, r_max):
    """The first T, from 2,000 on, for which every tree's bound is below r_max / 2."""
    num_iterations = 2000
    while (bound_of(trees, r_max, num_iterations) >= r_max / 2).any():
        num_iterations += 1000
    return num_iterations


def bound_of(trees, r_max, num_iterations):
    return theorem_1_bound(trees.log_concentrability, r_max, trees.horizon, num_iterations)


def never_falls(gap):
    """J(pi*) - J(pi_t) does not rise, up to the rounding of a float64: `[T + 1, trees]`."""
    return (gap[1:] <= gap[:-1] * (1 + 1e-12)).all(axis=0)


def keeps_bound(gap, bound):
    """The best of pi_0 .. pi_{T-1}, a policy for each beta, is no further from pi* than allowed."""
    return gap[:-1].min(axis=0) <= bound


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def measured(request):
    """Trees of one shape, their r_max, the bounds, and the gaps of the loop `[T + 1, trees]`."""
    vocabulary, horizon = request.param
    trees, r_max = trees_of(vocabulary, horizon), R_MAX[horizon]
    num_iterations = enough_iterations(trees, r_max)
    bound = bound_of(trees, r_max, num_iterations)
    schedule = theorem_betas(trees, r_max, num_iterations)
    return trees, r_max, bound, -expected_rewards(trees.shortfalls(), schedule)


def test_there_are_enough_trees():
    assert TREES * len(SHAPES) >= 20


def test_j_never_falls_and_the_best_iterate_keeps_the_bound(measured):
    _, r_max, bound, gap = measured
    assert len(gap) > 2000
    assert (bound < r_max / 2).all()
    assert (gap >= 0).all()
    assert never_falls(gap).all()
    assert keeps_bound(gap, bound).all()


def test_the_bound_asks_for_something(measured):
    """The frozen policy breaks it on the trees with binary rewards: there IRO has to do work."""
    _, _, bound, gap = measured
    assert (gap[0] > bound)[1::2].all()


def test_j_rises_from_the_first_step(measured):
    """Strictly: no tree gives all answers the same reward."""
    _, _, _, gap = measured
    assert (gap[1:20] < gap[:19]).all()


def test_betas_of_the_other_sign_break_both(measured):
    """The opposite policy update: what the tests above assert is false for it."""
    trees, r_max, bound, gap = measured
    schedule = -theorem_betas(trees, r_max, len(gap) - 1)
    reversed_gap = -expected_rewards(trees.shortfalls(), schedule[:500])
    assert not never_falls(reversed_gap).any()
    assert (np.diff(reversed_gap[:20], axis=0) > 0).all()
    assert not keeps_bound(reversed_gap, bound)[1::2].any()


@pytest.mark.parametrize("log_c", [2.0, 8.0])
def test_the_rate_is_that_of_the_schedule(log_c):
    """The worst of two answers, chosen anew for every T, stays a constant factor below the bound.

    A fixed tree leaves the bound behind, in the end exponentially; this family does not, and its
    slope in log-log is the bound's own, -1/2 + 1/(2 log T) at T.
    """
    family = hard_trees(log_c)
    np.testing.assert_allclose(family.log_concentrability, log_c)
    counts = np.array([500, 1000, 2000, 4000])
    worst, bound = [], []
    for count in counts:
        schedule = theorem_betas(family, 1.0, count)
        gap = -expected_rewards(family.shortfalls(), schedule)
        worst.append(gap[:-1].min(axis=0).max())
        bound.append(bound_of(family, 1.0, count)[0])
    ratio = np.array(worst) / bound
    assert ((ratio > 0.08) & (ratio < 0.13)).all()
    slopes = [np.polyfit(np.log(counts), np.log(curve), 1)[0] for curve in (worst, bound)]
    assert -0.5 < slopes[1] < -0.4
    assert abs(slopes[0] - slopes[1]) < 0.03


def test_a_fixed_tree_falls_faster_than_its_bound():
    """Two answers half a reward apart: from 500 to 8,000 iterations the gap loses 19 digits."""
    tree = AnswerTree((np.log([[[0.1, 0.9]]]),), np.array([[1.0, 0.5]]))
    few, many = (
        -expected_rewards(tree.shortfalls(), theorem_betas(tree, 1.0, count))[count - 1, 0]
        for count in (500, 8000)
    )
    assert 1e-9 < few < 1e-7
    assert many < 1e-18 * few
