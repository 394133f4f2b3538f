"""Losses and targets of value functions, against loops over rollouts and prefixes in f64."""

import doctest
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from iro_jax.values import losses, targets

# Four rollouts with padding on the left, on the right, on both sides and nowhere.
MASK = np.array(
    [[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool
)
BATCH, LENGTH = MASK.shape
SUPPORT, ATOMS = (-1.0, 1.5), 6
WEIGHTS = [None, np.array([1.0, 0.0, 2.0, 0.5])]
REWARDS = np.array([0.7, -0.3, 1.5, -1.0])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def squared(values, targets_):
    return lambda row, h: (values[row, h] - targets_[row, h]) ** 2


def cross_entropy(logits, row, h):
    """With the two atoms around the reward, weighted by how near they are."""
    low, high = SUPPORT
    step = (high - low) / (ATOMS - 1)
    normaliser = math.log(sum(math.exp(logit) for logit in logits[row, h]))
    loss = 0.0
    for j in range(ATOMS):
        distance = abs(REWARDS[row] - (low + j * step)) / step
        if distance < 1:
            loss -= (1 - distance) * (logits[row, h, j] - normaliser)
    return loss


def cases():
    """Per loss: its function, values or logits, what else it takes, and the loss at one prefix."""
    values, others = normal(0, BATCH, LENGTH), normal(1, BATCH, LENGTH)
    logits = normal(2, BATCH, LENGTH, ATOMS)
    repeated = np.repeat(REWARDS[:, None], LENGTH, axis=1)
    solved = np.array([1.0, 0.0, 1.0, 0.25])

    def binary(row, h):
        value = 1 / (1 + math.exp(-values[row, h]))
        return -solved[row] * math.log(value) - (1 - solved[row]) * math.log(1 - value)

    def controlled(row, h):
        is_last = not MASK[row, h + 1 :].any()
        return (values[row, h] - (REWARDS[row] if is_last else others[row, h])) ** 2 / 2

    def on_atoms(logits, rewards, mask, weights):
        return losses.categorical_loss(logits, rewards, mask, SUPPORT, weights)

    def categorical(row, h):
        return cross_entropy(logits, row, h)

    return {
        "monte_carlo": (losses.monte_carlo_loss, values, (REWARDS,), squared(values, repeated)),
        "verifiable": (losses.verifiable_loss, values, (solved,), binary),
        "categorical": (on_atoms, logits, (REWARDS,), categorical),
        "td": (losses.td_loss, values, (others,), squared(values, others)),
        "cdq": (losses.cdq_loss, values, (others, REWARDS), controlled),
        "compression": (losses.compression_loss, values, (others,), squared(values, others)),
    }


CASES = cases()


@functools.cache
def compiled(name):
    """A loss of (values or logits, weights), and it with its gradient."""
    loss, _, constants, _ = CASES[name]

    def with_constants(function):
        function = jax.jit(function)
        return lambda x, weights: function(x, *map(jnp.array, constants), MASK, weights)

    return with_constants(loss), with_constants(jax.value_and_grad(loss))


@pytest.mark.parametrize("weights", WEIGHTS, ids=["mean", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_the_mean_over_rollouts_of_the_sum_over_prefixes(name, weights):
    (loss, _), (_, x, _, at_prefix) = compiled(name), CASES[name]
    per_rollout = [
        sum(at_prefix(row, h) for h in range(LENGTH) if MASK[row, h]) for row in range(BATCH)
    ]
    with jax.enable_x64(True):
        weighted = None if weights is None else jnp.asarray(weights)
        got = loss(jnp.asarray(x), weighted)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.average(per_rollout, weights=weights), rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_that_of_finite_differences(name):
    with jax.enable_x64(True):
        (loss, _), (_, x, *_) = compiled(name), CASES[name]
        check_grads(lambda x: loss(x, jnp.asarray(WEIGHTS[1])), (jnp.asarray(x),), 1, ["rev"])


@pytest.mark.parametrize("name", CASES)
def test_nothing_at_padding_or_in_filler_is_seen(name):
    (_, grad), (_, x, *_) = compiled(name), CASES[name]
    weights = jnp.asarray(WEIGHTS[1])
    real = MASK & (WEIGHTS[1] != 0)[:, None]
    expected, expected_grad = grad(jnp.asarray(x), weights)
    x = x.copy()
    for other in (np.nan, np.inf):
        x[~real] = other
        got, got_grad = grad(jnp.asarray(x), weights)
        assert got == expected
        np.testing.assert_array_equal(got_grad, expected_grad)
        assert np.all(np.isfinite(got_grad))
        assert np.all(np.asarray(got_grad)[~real] == 0)


def test_neither_targets_nor_rewards_are_seen_at_padding_or_in_filler():
    values, weights = jnp.asarray(normal(0, BATCH, LENGTH)), jnp.asarray(WEIGHTS[1])
    real = MASK & (WEIGHTS[1] != 0)[:, None]
    broken = jnp.where(real, 0.5, jnp.nan)
    rewards = jnp.where(weights != 0, 0.5, jnp.nan)
    logits = jnp.asarray(normal(2, BATCH, LENGTH, ATOMS))
    for loss in (
        lambda x: losses.td_loss(x, broken, MASK, weights),
        lambda x: losses.compression_loss(x, broken, MASK, weights),
        lambda x: losses.cdq_loss(x, broken, rewards, MASK, weights),
        lambda x: losses.monte_carlo_loss(x, rewards, MASK, weights),
        lambda x: losses.verifiable_loss(x, rewards, MASK, weights),
        lambda x: losses.categorical_loss(logits * x[..., None], rewards, MASK, SUPPORT, weights),
    ):
        value, gradient = jax.jit(jax.value_and_grad(loss))(values)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_a_reward_that_is_nan_is_not_hidden():
    @jax.jit
    def each(rewards):
        values, logits = jnp.zeros(MASK.shape), jnp.zeros((*MASK.shape, ATOMS))
        return (
            losses.monte_carlo_loss(values, rewards, MASK),
            losses.verifiable_loss(values, rewards, MASK),
            losses.categorical_loss(logits, rewards, MASK, SUPPORT),
        )

    assert np.all(np.isfinite(each(jnp.zeros(BATCH))))
    assert np.all(np.isnan(each(jnp.array([0.0, jnp.nan, 0.0, 0.0]))))


@pytest.mark.parametrize("name", CASES)
def test_filler_alone_is_worth_nothing(name):
    value, gradient = compiled(name)[1](jnp.asarray(CASES[name][1]), jnp.zeros(BATCH))
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("name", CASES)
def test_sums_of_half_precision_values_are_in_f32(name):
    (loss, _), (_, x, *_) = compiled(name), CASES[name]
    half = jnp.asarray(x, jnp.bfloat16)
    got = loss(half, None)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, loss(half.astype(jnp.float32), None), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.td_loss, losses.compression_loss])
def test_no_gradient_flows_into_targets(loss):
    x = jnp.asarray(normal(0, BATCH, LENGTH))
    of_both = jax.jit(jax.grad(lambda x: loss(x, 2 * x + 1, MASK)))(x)
    of_values = jax.jit(jax.grad(loss))(x, 2 * x + 1, MASK)
    np.testing.assert_array_equal(of_both, of_values)


def test_no_gradient_flows_into_the_expected_next_value():
    x, rewards = jnp.asarray(normal(0, BATCH, LENGTH)), jnp.asarray(REWARDS)
    of_both = jax.jit(jax.grad(lambda x: losses.cdq_loss(x, 2 * x + 1, rewards, MASK)))(x)
    of_values = jax.jit(jax.grad(losses.cdq_loss))(x, 2 * x + 1, rewards, MASK)
    np.testing.assert_array_equal(of_both, of_values)


@pytest.mark.slow
def test_binary_cross_entropy_is_that_of_torch():
    torch = pytest.importorskip("torch")
    logits = np.concatenate([normal(0, 1, 50) * 8, [[0, 90, -90, 1e4, -1e4]]], axis=1)
    logits = logits.astype(np.float32)
    loss = jax.jit(jax.value_and_grad(losses.verifiable_loss))
    for reward in (0.0, 1.0, 0.3):
        mine, mine_grad = loss(
            jnp.asarray(logits), jnp.array([reward]), jnp.ones(logits.shape, bool)
        )
        x = torch.tensor(logits, requires_grad=True)
        theirs = torch.nn.functional.binary_cross_entropy_with_logits(
            x, torch.full(logits.shape, reward), reduction="sum"
        )
        theirs.backward()
        np.testing.assert_allclose(mine, theirs.item(), rtol=1e-6)
        np.testing.assert_allclose(mine_grad, x.grad, rtol=1e-5, atol=1e-7)


def test_two_hot_keeps_the_reward_as_its_mean():
    rewards = np.linspace(-1, 1.5, 201)
    atoms = np.linspace(*SUPPORT, ATOMS)
    weights = np.asarray(losses.two_hot(jnp.asarray(rewards), SUPPORT, ATOMS))
    np.testing.assert_allclose(weights @ atoms, rewards, atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    assert np.all(weights >= 0)
    for row in weights:
        places = np.flatnonzero(row > 1e-6)
        assert len(places) <= 2
        assert np.ptp(places) <= 1


def test_two_hot_takes_rewards_outside_the_support_for_its_ends():
    weights = losses.two_hot(jnp.array([-7.0, 7.0]), SUPPORT, ATOMS)
    np.testing.assert_array_equal(weights, np.eye(ATOMS)[[0, -1]])


def test_the_categorical_loss_is_least_where_the_value_is_the_mean_reward():
    rewards = jnp.array([0.5, -1.0, 0.75])
    expected = np.asarray(losses.two_hot(rewards, SUPPORT, ATOMS)).mean(axis=0)
    best = np.broadcast_to(np.log(expected + 1e-12), (3, 1, ATOMS))
    gradient_of = jax.jit(jax.grad(losses.categorical_loss), static_argnames="support")
    gradient = np.asarray(gradient_of(best, rewards, np.ones((3, 1), bool), support=SUPPORT))
    np.testing.assert_allclose(gradient.sum(axis=(0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(expected @ np.linspace(*SUPPORT, ATOMS), 0.25 / 3, rtol=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    values, rewards, mask = jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones((2, 3), bool)
    for call, got in (
        (lambda: losses.monte_carlo_loss(values[..., None], rewards, mask), r"\(2, 3, 1\)"),
        (lambda: losses.monte_carlo_loss(values, rewards[:, None], mask), r"\(2, 1\)"),
        (lambda: losses.verifiable_loss(values, rewards, mask, jnp.ones((2, 1))), r"\(2, 1\)"),
        (lambda: losses.td_loss(values, rewards[:, None], mask), r"\(2, 1\)"),
        (lambda: losses.cdq_loss(values, values[:1], rewards, mask), r"\(1, 3\)"),
        (lambda: losses.categorical_loss(values, rewards, mask, SUPPORT), r"\(2, 3\)"),
        (lambda: losses.two_hot(rewards, (1.0, 0.0), 3), r"\(1.0, 0.0\), 3 atoms"),
        (lambda: targets.gae_targets(values, rewards[:, None], mask), r"\(2, 1\)"),
        (lambda: targets.td_lambda_targets(values, rewards, mask, lam=1.5), "1.0 and 1.5"),
    ):
        with pytest.raises(ValueError, match=f"Got: .*{got}"):
            call()


# Targets.

BOTH = [
    jax.jit(function, static_argnames=("gamma", "lam"))
    for function in (targets.td_lambda_targets, targets.gae_targets)
]
GRID = [(1.0, 0.99), (1.0, 1.0), (0.95, 0.5), (0.9, 0.0), (0.0, 0.7), (1.0, 0.0)]


def forward_view(values, reward, gamma, lam):
    """Lambda-returns of one rollout as the definition has them: a mixture of n-step returns."""
    last = len(values) - 1
    returns = []
    for h in range(last):
        steps = last - h
        n_step = [gamma**n * values[h + n] for n in range(1, steps)]
        final = gamma ** (steps - 1) * reward
        mixture = sum((1 - lam) * lam ** (n - 1) * g for n, g in enumerate(n_step, 1))
        returns.append(mixture + lam ** (steps - 1) * final)
    return [*returns, reward]


def sums_of_errors(values, reward, gamma, lam):
    """Values plus generalised advantages of one rollout: discounted sums of TD errors."""
    last = len(values) - 1
    rewards = [reward if h == last - 1 else 0.0 for h in range(last)]
    nexts = [0.0 if h == last - 1 else values[h + 1] for h in range(last)]
    errors = [rewards[h] + gamma * nexts[h] - values[h] for h in range(last)]
    return [
        values[h] + sum((gamma * lam) ** (i - h) * errors[i] for i in range(h, last))
        for h in range(last)
    ] + [reward]


@pytest.mark.parametrize(("gamma", "lam"), GRID)
@pytest.mark.parametrize(
    ("function", "oracle"), zip(BOTH, [forward_view, sums_of_errors], strict=True)
)
def test_targets_are_those_of_the_definition(function, oracle, gamma, lam):
    values = normal(5, BATCH, LENGTH)
    expected = np.zeros_like(values)
    for row in range(BATCH):
        expected[row, MASK[row]] = oracle(values[row, MASK[row]], REWARDS[row], gamma, lam)
    values[~MASK] = np.nan
    got = function(jnp.asarray(values), jnp.asarray(REWARDS), jnp.asarray(MASK), gamma, lam)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), GRID)
def test_both_targets_are_one(gamma, lam):
    arrays = jnp.asarray(normal(6, BATCH, LENGTH)), jnp.asarray(REWARDS), jnp.asarray(MASK)
    td, gae = (function(*arrays, gamma, lam) for function in BOTH)
    np.testing.assert_allclose(td, gae, atol=1e-6)


@pytest.mark.parametrize("function", BOTH)
def test_without_discount_or_bootstrapping_every_target_is_the_reward(function):
    values = jnp.asarray(normal(7, BATCH, LENGTH))
    got = function(values, jnp.asarray(REWARDS), jnp.asarray(MASK), 1.0, 1.0)
    np.testing.assert_allclose(got, REWARDS[:, None] * MASK, rtol=1e-5)


@pytest.mark.parametrize("function", BOTH)
def test_with_lambda_zero_a_target_looks_one_step_ahead(function):
    values, mask = jnp.asarray(normal(7, 1, 5)), jnp.ones((1, 5), bool)
    got = function(values, jnp.array([2.0]), mask, 0.9, 0.0)[0]
    np.testing.assert_allclose(got[:3], 0.9 * values[0, 1:4], rtol=1e-6)
    np.testing.assert_allclose(got[3:], 2, rtol=1e-6)


@pytest.mark.parametrize("function", BOTH)
def test_the_value_of_the_complete_answer_is_never_used(function):
    values, mask = jnp.asarray(normal(7, 1, 5)), jnp.ones((1, 5), bool)
    changed = values.at[0, 4].add(3.0)
    first, second = (function(v, jnp.array([2.0]), mask, 0.9, 0.4) for v in (values, changed))
    np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.parametrize("function", BOTH)
def test_a_row_without_prefixes_has_no_targets(function):
    values, mask = jnp.full((1, 4), jnp.nan), jnp.zeros((1, 4), bool)
    assert function(values, jnp.array([jnp.nan]), mask).tolist() == [[0, 0, 0, 0]]


def every_answer():
    """All answers of three bits, uniform, with rewards and the exact values of their prefixes."""
    answers = list(itertools.product((0, 1), repeat=3))
    rewards = dict(zip(answers, normal(8, 8), strict=True))

    def value(prefix):
        return np.mean([rewards[a] for a in answers if a[: len(prefix)] == prefix])

    values = np.array([[value(a[:h]) for h in range(4)] for a in answers])
    return answers, values, np.array([rewards[a] for a in answers])


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("function", BOTH)
def test_exact_values_are_the_mean_of_their_targets(function, lam):
    answers, values, rewards = every_answer()
    mask = jnp.ones(values.shape, bool)
    got = np.asarray(function(jnp.asarray(values), jnp.asarray(rewards), mask, 1.0, lam))
    for row, answer in enumerate(answers):
        for h in range(4):
            same = [other[:h] == answer[:h] for other in answers]
            np.testing.assert_allclose(got[same, h].mean(), values[row, h], atol=1e-6)


def test_exact_values_have_no_controlled_decoding_loss():
    answers, values, rewards = every_answer()
    expected_next = np.full(values.shape, np.nan)
    for row, answer in enumerate(answers):
        for h in range(3):
            nexts = {a[: h + 1]: values[i, h + 1] for i, a in enumerate(answers)}
            expected_next[row, h] = np.mean([nexts[*answer[:h], z] for z in (0, 1)])
    mask = jnp.ones(values.shape, bool)
    arrays = jnp.asarray(expected_next), jnp.asarray(rewards), mask
    loss = jax.jit(losses.cdq_loss)
    assert loss(jnp.asarray(values), *arrays) < 1e-12
    values[3, 1] += 0.5
    assert loss(jnp.asarray(values), *arrays) > 1e-3


@pytest.mark.parametrize("module", [losses, targets], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
