"""Losses against their formulas one pair and one token at a time, and what they pull at."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from iro_jax import baselines as b


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_bradley_terry_is_the_mean_over_pairs():
    good, bad, margin = numbers(0, 5), numbers(1, 5), np.abs(numbers(2, 5))
    expected = [-math.log(sigmoid(g - r - m)) for g, r, m in zip(good, bad, margin, strict=True)]
    found = b.bradley_terry_loss(jnp.array(good), jnp.array(bad), jnp.array(margin))
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


def test_dpo_is_bradley_terry_of_log_ratios():
    of_policy, of_reference = numbers(0, 2, 6), numbers(1, 2, 6)
    expected = [
        -math.log(sigmoid(0.3 * ((p - r) - (q - s))))
        for p, q, r, s in zip(*of_policy, *of_reference, strict=True)
    ]
    found = b.dpo_loss(*map(jnp.array, (*of_policy, *of_reference)), beta=0.3)
    assert found == pytest.approx(np.mean(expected), rel=1e-5)
    equal = b.dpo_loss(*map(jnp.array, (*of_policy, *of_policy)))
    assert equal == pytest.approx(math.log(2))


def test_advantages_are_standardised_within_groups():
    rewards = numbers(3, 4, 8)
    found = b.group_advantages(rewards)
    for row, of_group in zip(rewards, found, strict=True):
        deviation = math.sqrt(sum((r - row.mean()) ** 2 for r in row) / 7)
        np.testing.assert_allclose(of_group, (row - row.mean()) / (deviation + 1e-4))
    assert b.group_advantages(np.ones((2, 3))).tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match=r"Got: \(2, 1\)"):
        b.group_advantages(np.ones((2, 1)))


def test_grpo_is_its_formula_token_by_token():
    log_probs, sampled, reference = -np.abs(numbers(4, 3, 5, 7))
    advantages = numbers(5, 5)
    lengths = [7, 1, 4, 6, 2]
    mask = np.arange(7) < np.asarray(lengths)[:, None]
    # What stands behind the ends must not matter.
    log_probs = np.where(mask, log_probs, np.nan)
    total = 0.0
    for i, length in enumerate(lengths):
        tokens = 0.0
        for t in range(length):
            ratio = math.exp(log_probs[i, t] - sampled[i, t])
            clipped = min(max(ratio, 0.8), 1.2)
            surrogate = min(ratio * advantages[i], clipped * advantages[i])
            behind = reference[i, t] - log_probs[i, t]
            tokens += -surrogate + 0.04 * (math.exp(behind) - behind - 1)
        total += tokens / length
    arrays = map(jnp.asarray, (log_probs, sampled, reference, advantages, mask))
    assert b.grpo_loss(*arrays) == pytest.approx(total / 5, rel=1e-4)


def test_the_penalty_of_grpo_estimates_the_divergence():
    policy, reference = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    divergence = float(np.sum(policy * np.log(policy / reference)))
    # Three answers of one token, weighted by how often the policy gives them.
    found = b.grpo_loss(
        jnp.log(policy)[:, None],
        jnp.log(policy)[:, None],
        jnp.log(reference)[:, None],
        jnp.zeros(3),
        jnp.ones((3, 1), bool),
        beta=1.0,
        weights=jnp.array(policy),
    )
    assert found == pytest.approx(divergence, rel=1e-5)


def test_irepo_is_least_where_the_log_ratio_is_the_soft_label():
    preference = np.array([0.9, 0.4])
    gap = np.log(preference / (1 - preference)) / 0.1
    zero = jnp.zeros(2)
    assert b.irepo_loss(jnp.array(gap), zero, zero, zero, jnp.array(preference)) < 1e-8
    found = b.irepo_loss(zero, zero, zero, zero, jnp.array(preference))
    assert found == pytest.approx(np.mean((0.1 * gap) ** 2), rel=1e-4)


@pytest.mark.parametrize("loss", [b.bradley_terry_loss, b.dpo_loss])
def test_gradients_raise_the_better_answer(loss):
    count = 2 if loss is b.bradley_terry_loss else 4
    arguments = [jnp.array(numbers(i, 3)) for i in range(count)]
    better, worse = jax.grad(loss, argnums=(0, 1))(*arguments)
    assert (better < 0).all()
    assert (worse > 0).all()


def test_what_weighs_nothing_is_filler():
    good, bad = jnp.array([1.0, jnp.nan]), jnp.array([0.0, 3.0])
    found = b.bradley_terry_loss(good, bad, weights=jnp.array([2.0, 0.0]))
    assert found == pytest.approx(-math.log(sigmoid(1.0)))


def test_strengths_maximise_the_likelihood_of_who_beat_whom():
    wins = np.random.default_rng(6).integers(1, 9, size=(4, 4)).astype(float)

    def loss(logits):
        chance = 1 / (1 + np.exp(logits[None, :] - logits[:, None]))
        return -np.sum(wins * (1 - np.eye(4)) * np.log(chance))

    best = np.exp(scipy.optimize.minimize(loss, np.zeros(4), tol=1e-12).x)
    np.testing.assert_allclose(b.strengths(wins), best / best.sum(), atol=1e-4)


def test_strengths_of_two_are_their_shares_of_wins():
    assert b.strengths([[0, 5], [3, 0]]).tolist() == pytest.approx([5 / 8, 3 / 8])
    assert b.strengths([[0, 2], [0, 0]]).tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="item 2 that has not"):
        b.strengths([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="square"):
        b.strengths([[0, -1], [1, 0]])


def test_soft_preferences_are_strengths_of_pairs_kept_from_certainty():
    first = [[1.0, 2.0, 0.0], [1.0, 0.0, 5.0], [3.0, 2.0, 1.0]]
    second = [[0.0, 2.0, 1.0], [2.0, 1.0, 4.0], [1.0, 1.0, 0.0]]
    found = b.soft_preference(first, second)
    np.testing.assert_allclose(found, [2 / 3, 1.5 / 3, 2 / 3])
    for number, share in enumerate(found):
        won = sum((a[number] > c[number]) + 0.5 * (a[number] == c[number])
                  for a, c in zip(first, second, strict=True))  # fmt: skip
        assert b.strengths([[0, won], [3 - won, 0]])[0] == pytest.approx(share)
    assert b.soft_preference([[1.0]], [[0.0]]).tolist() == [0.95]
