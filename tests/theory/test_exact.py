"""Exact policies and values against enumeration, prefix by prefix, and against the search."""

import itertools

import numpy as np
import pytest

from iro_jax.exact import (
    AnswerTree,
    action_values,
    expected_rewards,
    random_trees,
    reweight,
)
from iro_jax.search import softmax_per_parent
from tests.search.tabular import EOS, Tabular
from tests.search.test_laws import particles

BETAS = (0.3, 0.5, 0.6)
PROBLEMS = [(2, 4, False), (3, 3, True), (4, 2, True), (3, 2, False)]


def as_tree(problem):
    """A `Tabular` problem as an `AnswerTree`: EOS is repeated up to the horizon."""
    log_policy = []
    for depth in range(problem.horizon):
        rows = []
        for prefix in itertools.product(range(problem.vocabulary), repeat=depth):
            ended = problem.has_eos and EOS in prefix
            only_eos = np.where(np.arange(problem.vocabulary) == EOS, 0.0, -np.inf)
            rows.append(only_eos if ended else problem.step_log_probs(prefix))
        log_policy.append(np.array(rows))
    rewards = []
    for tokens in itertools.product(range(problem.vocabulary), repeat=problem.horizon):
        answer = tokens
        if problem.has_eos and EOS in tokens:
            answer = tokens[: tokens.index(EOS) + 1]
        rewards.append(problem.rewards[answer])
    return AnswerTree(tuple(log_policy), np.array(rewards))


class Enumerated:
    """Algorithm 3 by recursion over prefixes, with the update of equation (5), in Python."""

    def __init__(self, problem):
        self.problem = problem
        self.probs = {}
        for prefix in problem.values():
            if not problem.is_complete(prefix):
                weights = np.exp(problem.step_log_probs(prefix))
                self.probs[prefix] = weights / weights.sum()

    def value(self, prefix=()):
        if self.problem.is_complete(prefix):
            return self.problem.rewards[prefix]
        return sum(p * self.value((*prefix, a)) for a, p in enumerate(self.probs[prefix]))

    def values(self, prefix):
        return np.array([self.value((*prefix, a)) for a in range(self.problem.vocabulary)])

    def update(self, beta):
        weights = {s: p * np.exp(self.values(s) / beta) for s, p in self.probs.items()}
        self.probs = {s: w / w.sum() for s, w in weights.items()}


@pytest.mark.parametrize(("vocabulary", "horizon", "has_eos"), PROBLEMS)
def test_the_loop_against_enumeration(vocabulary, horizon, has_eos):
    """Sums of values over pi_base (6) are the same policies as one update after another (5)."""
    problem = Tabular.random(1, vocabulary, horizon, has_eos=has_eos)
    enumerated, expected = Enumerated(problem), []
    for beta in BETAS:
        expected.append(enumerated.value())
        enumerated.update(beta)
    expected.append(enumerated.value())
    assert np.ptp(expected) > 0.1
    found = expected_rewards(as_tree(problem), np.array(BETAS))
    np.testing.assert_allclose(found, expected, atol=1e-6)  # the policies are stored in f32


@pytest.mark.parametrize(("vocabulary", "horizon", "has_eos"), PROBLEMS)
def test_values_of_every_prefix_against_enumeration(vocabulary, horizon, has_eos):
    problem = Tabular.random(2, vocabulary, horizon, has_eos=has_eos)
    enumerated, tree = Enumerated(problem), as_tree(problem)
    values, _ = action_values(tree.log_policy, tree.rewards)
    for prefix in enumerated.probs:
        state = sum(a * vocabulary**i for i, a in enumerate(reversed(prefix)))
        found = values[len(prefix)][state]
        np.testing.assert_allclose(found, enumerated.values(prefix), atol=1e-6)


@pytest.mark.parametrize(("vocabulary", "horizon", "has_eos"), PROBLEMS)
@pytest.mark.parametrize("seed", range(4))
def test_concentrability_against_its_definition(vocabulary, horizon, has_eos, seed):
    """The largest ratio of visits, over depths, prefixes and tokens.

    Rewards come in few levels, so there are several optimal policies: the one with the
    smallest C_ST counts.
    """
    problem = Tabular.random(seed, vocabulary, horizon, has_eos=has_eos, levels=3)
    best = max(problem.rewards.values())
    ratios = []
    for answer in (y for y, reward in problem.rewards.items() if reward == best):
        visits = [np.exp(problem.log_prob(answer[: h + 1])) for h in range(len(answer))]
        ratios.append(max(1 / visit for visit in visits))
    tree = as_tree(problem)
    assert tree.best_reward == best
    np.testing.assert_allclose(tree.log_concentrability, np.log(min(ratios)), rtol=1e-6)


def test_reweight_by_hand():
    """Probabilities 1/4 and 3/4, scores log 3 and 0: as likely as each other; EOS stays sure."""
    log_policy = np.log([[0.25, 0.75], [1.0, 1e-300]])
    log_policy[1, 1] = -np.inf
    found = np.exp(reweight(log_policy, np.array([[np.log(3), 0.0], [-5.0, 7.0]])))
    np.testing.assert_allclose(found, [[0.5, 0.5], [1.0, 0.0]], rtol=1e-12)


def test_reweight_by_scores_that_exp_cannot_hold():
    found = reweight(np.log([[0.5, 0.5]]), np.array([[10_000.0, 9_000.0]]))
    np.testing.assert_allclose(found, [[0.0, -1000.0]], atol=1e-9)


def test_a_batch_is_its_trees_one_by_one():
    trees = random_trees(0, 3, 3, 3, has_eos=True)
    betas = np.array([[0.5, 1.0, 2.0], [0.7, 1.0, 3.0]])
    together = expected_rewards(trees, betas)
    for i in range(3):
        alone = AnswerTree(tuple(step[i] for step in trees.log_policy), trees.rewards[i])
        np.testing.assert_allclose(expected_rewards(alone, betas[:, i]), together[:, i])
        assert alone.log_concentrability == trees.log_concentrability[i]


def test_shortfalls_leave_the_policies_as_they_were():
    trees, betas = random_trees(3, 4, 3, 3), np.ones(5)
    gap = trees.best_reward - expected_rewards(trees, betas)
    np.testing.assert_allclose(-expected_rewards(trees.shortfalls(), betas), gap, atol=1e-12)


@pytest.mark.parametrize("has_eos", [False, True])
def test_random_trees_are_policies_and_rewards(has_eos):
    trees = random_trees(5, 6, 3, 3, has_eos=has_eos)
    for step in trees.log_policy:
        np.testing.assert_allclose(np.exp(step).sum(-1), 1.0)
    # Without EOS 27 answers; with it 1 of one token, 2 of two, 4 * 3 of three.
    assert (np.isfinite(trees.log_probs).sum(-1) == (15 if has_eos else 27)).all()
    np.testing.assert_allclose(np.exp(trees.log_probs).sum(-1), 1.0)
    assert ((trees.rewards >= 0) & (trees.rewards <= 1)).all()
    assert all(len(np.unique(rewards)) == 27 for rewards in trees.rewards[::2])
    for rewards, log_probs in zip(trees.rewards[1::2], trees.log_probs[1::2], strict=True):
        assert set(rewards[np.isfinite(log_probs)]) == {0.0, 1.0}


def test_the_search_samples_from_the_exact_policy():
    """One successor a parent, by softmax of sum_i Q_i / beta_i at L = 1: pi_3 as B grows."""
    problem = Tabular.random(6, 3, 3, levels=7)
    enumerated = Enumerated(problem)
    scores = dict.fromkeys(problem.values(), 0.0)
    for beta in BETAS:
        scores = {s: score + enumerated.value(s) / beta for s, score in scores.items()}
        enumerated.update(beta)
    expected = expected_rewards(as_tree(problem), np.array(BETAS))
    sampled = particles(problem, scores, 512, 64, softmax_per_parent, 0)
    found = sum(share * problem.rewards[answer] for answer, share in sampled.items())
    assert abs(found - expected[3]) < 0.05 < expected[3] - expected[2]
