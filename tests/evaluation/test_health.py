"""The health of a value function against plain loops, and against policies with known values."""

import itertools
import json
import math

import numpy as np
import pytest

from iro_jax.evaluation import (
    Fit,
    Health,
    bootstrap,
    drift,
    errors_by_prompt,
    measure_health,
    reward_gap,
)

L, LONGEST = 4, 18


def rollouts(seed=0, prompts=6, per_prompt=5, noise=0.3, bias=0.0):
    """Values that know the prompt's mean at first and the reward better and better."""
    rng = np.random.default_rng(seed)
    n = prompts * per_prompt
    ids = [f"prompt-{i % prompts}" for i in range(n)]
    difficulty = rng.normal(size=prompts)[np.arange(n) % prompts]
    rewards = difficulty + rng.normal(size=n)
    lengths = rng.integers(0, LONGEST + 1, size=n)
    lengths[:2] = 0, LONGEST
    mask = np.arange(LONGEST + 1) <= lengths[:, None]
    progress = np.arange(LONGEST + 1) / np.maximum(lengths, 1)[:, None]
    values = difficulty[:, None] + progress * (rewards - difficulty)[:, None] + bias
    values[:, 1:] += noise * rng.normal(size=(n, LONGEST))
    return np.where(mask, values, np.nan), mask, rewards, ids


def pairs(data, wanted):
    """(value, reward, prompt) at the prefixes of `wanted(length of prefix, length of answer)`."""
    values, mask, rewards, ids = data
    for i in range(len(rewards)):
        length = int(mask[i].sum()) - 1
        for j in range(length + 1):
            if wanted(j, length):
                yield float(values[i, j]), float(rewards[i]), ids[i]


def mean(xs):
    xs = list(xs)
    return sum(xs) / len(xs)


def correlation(xs, ys):
    mx, my = mean(xs), mean(ys)
    cross = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return cross / math.sqrt(sum((x - mx) ** 2 for x in xs) * sum((y - my) ** 2 for y in ys))


def ranks(xs):
    return [sum(x < other for x in xs) + sum(x == other for x in xs) / 2 for other in xs]


def centred(xs, ids):
    means = {p: mean(x for x, q in zip(xs, ids, strict=True) if q == p) for p in set(ids)}
    return [x - means[p] for x, p in zip(xs, ids, strict=True)]


def check_fit(fit, expected):
    expected = list(expected)
    assert fit.count == len(expected)
    values, rewards, ids = zip(*expected, strict=True)
    error = mean((v - r) ** 2 for v, r in zip(values, rewards, strict=True))
    variance = mean((r - mean(rewards)) ** 2 for r in rewards)
    assert fit.bias == pytest.approx(mean(values) - mean(rewards))
    assert fit.mean_squared_error == pytest.approx(error)
    assert fit.reward_variance == pytest.approx(variance)
    assert fit.r_squared == pytest.approx(1 - error / variance)
    assert fit.pearson == pytest.approx(correlation(values, rewards))
    assert fit.spearman == pytest.approx(correlation(ranks(values), ranks(rewards)))
    if fit.within_prompt is not None:
        inner = correlation(centred(values, ids), centred(rewards, ids))
        assert fit.within_prompt == pytest.approx(inner)


def test_every_fit_is_that_of_a_plain_loop():
    data = rollouts()
    found = measure_health(*data, L)
    check_fit(found.overall, pairs(data, lambda j, length: True))
    check_fit(found.prompt, pairs(data, lambda j, length: j == 0))
    check_fit(found.answer, pairs(data, lambda j, length: j == length))
    assert found.overall.within_prompt is not None
    assert len(found.positions) == len(found.boundaries) == 1 + math.ceil(LONGEST / L)
    for k in range(len(found.positions)):
        tokens = {0} if k == 0 else set(range((k - 1) * L + 1, k * L + 1))
        check_fit(found.positions[k], pairs(data, lambda j, length, inside=tokens: j in inside))
        check_fit(
            found.boundaries[k],
            pairs(
                data,
                lambda j, length, inside=tokens: j in inside and (j == max(inside) or j == length),
            ),
        )


def test_what_is_not_under_the_mask_does_not_count():
    values, mask, rewards, ids = rollouts()
    noise = np.random.default_rng(1).normal(size=values.shape)
    other = np.where(mask, values, noise)
    assert measure_health(values, mask, rewards, ids, L) == measure_health(
        other, mask, rewards, ids, L
    )


def test_variance_within_and_between_prompts():
    _, _, rewards, ids = data = rollouts()
    found = measure_health(*data, L)
    inner = centred(rewards, ids)
    assert found.within_prompt_variance == pytest.approx(mean(x**2 for x in inner))
    total = found.within_prompt_variance + found.between_prompt_variance
    assert total == pytest.approx(found.reward_variance) == pytest.approx(np.var(rewards))
    # At the bare prompt a value function can at most know its prompt's mean.
    assert found.prompt.r_squared < found.between_prompt_variance / found.reward_variance
    assert (found.num_prompts, found.num_rollouts) == (6, 30)
    assert found.num_prefixes == found.overall.count == data[1].sum()


def test_deciles_are_tenths_of_the_prefixes_by_value():
    data = rollouts(seed=2, prompts=20)
    found = measure_health(*data, L)
    ordered = sorted(pairs(data, lambda j, length: True))
    assert len(found.deciles) == 10
    assert sum(group.count for group in found.deciles) == len(ordered)
    start, error = 0, 0.0
    for group in found.deciles:
        assert abs(group.count - len(ordered) / 10) <= 1
        members = ordered[start : start + group.count]
        start += group.count
        assert group.predicted == pytest.approx(mean(v for v, _, _ in members))
        assert group.reward == pytest.approx(mean(r for _, r, _ in members))
        error += group.count * abs(group.predicted - group.reward) / len(ordered)
    assert found.calibration_error == pytest.approx(error)


def chain(seed=0, horizon=12, n=20_000):
    """Coin flips with a reward for many heads, and its exact value before every flip."""
    rng = np.random.default_rng(seed)
    flips = rng.random((n, horizon)) < 0.5
    heads = np.concatenate([np.zeros((n, 1), int), np.cumsum(flips, axis=1)], axis=1)
    win = {
        (h, left): sum(math.comb(left, k) for k in range(left + 1) if h + k > horizon // 2)
        / 2**left
        for h, left in itertools.product(range(horizon + 1), repeat=2)
    }
    values = np.array([[win[h, horizon - j] for j, h in enumerate(row)] for row in heads])
    return values, np.ones(values.shape, bool), values[:, -1], np.arange(n) % 50


def test_exact_values_are_calibrated_and_know_more_with_every_chunk():
    values, mask, rewards, ids = chain()
    found = measure_health(values, mask, rewards, ids, 3)
    assert abs(found.overall.bias) < 0.01
    assert found.calibration_error < 0.01
    explained = [fit.r_squared for fit in found.boundaries]
    assert explained == sorted(explained)
    assert abs(explained[0]) < 0.001
    assert explained[-1] == 1
    # What exact values explain is their own variance: E[r | s] and r - E[r | s] do not correlate.
    for k, share in enumerate(explained[1:], 1):
        variance = values[:, 3 * k].var()
        assert share == pytest.approx(variance / rewards.var(), abs=0.02)
        assert found.boundaries[k].pearson ** 2 == pytest.approx(share, abs=0.02)


def test_scaled_values_show_in_the_calibration_only():
    values, mask, rewards, ids = chain(n=2000)
    exact = measure_health(values, mask, rewards, ids, 3)
    timid = measure_health(0.5 + 0.2 * (values - 0.5), mask, rewards, ids, 3)
    assert timid.calibration_error > exact.calibration_error + 0.1
    assert timid.overall.spearman == pytest.approx(exact.overall.spearman)
    low, high = timid.deciles[0], timid.deciles[-1]
    assert low.predicted > low.reward + 0.1
    assert high.predicted < high.reward - 0.1


def test_health_survives_json():
    found = measure_health(*rollouts(), L)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Health.from_json(json.loads(text)) == found


def degenerate(name):
    values, mask, rewards, ids = rollouts()
    if name == "constant reward":
        return values, mask, np.full_like(rewards, 0.3), ids
    if name == "constant value":
        return np.where(mask, 0.25, np.nan), mask, rewards, ids
    if name == "constant value up to rounding":
        return np.float32(0.7) + 1e-7 * (values - rewards[:, None]), mask, rewards, ids
    if name == "one rollout":
        return values[1:2], mask[1:2], rewards[1:2], ids[1:2]
    if name == "no tokens":
        return values[:1, :1], mask[:1, :1], rewards[:1], ids[:1]
    if name == "one rollout a prompt":
        return values, mask, rewards, np.arange(len(rewards))
    wide = np.pad(mask, [(0, 0), (0, 2 * L)])
    return np.pad(values, [(0, 0), (0, 2 * L)]), wide, rewards, ids


@pytest.mark.parametrize(
    "name",
    [
        "constant reward",
        "constant value",
        "constant value up to rounding",
        "one rollout",
        "no tokens",
        "one rollout a prompt",
        "empty chunk",
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_data_cannot_tell_is_none(name):
    found = measure_health(*degenerate(name), L)
    json.dumps(found.to_json(), allow_nan=False)
    fit = found.overall
    no_correlation = (None, None, None)
    if name in ("constant reward", "one rollout", "no tokens"):
        assert fit.r_squared is None
        assert (fit.pearson, fit.spearman, fit.within_prompt) == no_correlation
        assert fit.mean_squared_error >= 0
        assert found.reward_variance == pytest.approx(0)
    elif name.startswith("constant value"):
        assert (fit.pearson, fit.spearman, fit.within_prompt) == no_correlation
        assert len(found.deciles) == 1 or name.endswith("rounding")
        assert fit.r_squared <= 0
    elif name == "one rollout a prompt":
        assert fit.within_prompt is None
        assert fit.pearson is not None
        assert found.within_prompt_variance == pytest.approx(0)
    else:
        assert found.positions[-1] == found.boundaries[-1] == Fit(count=0)
        assert found.overall == measure_health(*rollouts(), L).overall
    if name == "no tokens":
        assert found.prompt == found.answer == found.overall
        assert len(found.positions) == 1


def test_the_bare_prompt_says_nothing_about_which_of_its_answers_is_better():
    values, mask, rewards, ids = rollouts()
    # The same prompt in other batches: equal up to rounding.
    values[:, 0] *= 1 + 1e-6 * np.random.default_rng(0).normal(size=len(values))
    assert measure_health(values, mask, rewards, ids, L).prompt.within_prompt is None


def test_errors_by_prompt_average_to_the_overall_error():
    data = rollouts()
    found = errors_by_prompt(*data)
    values, mask, rewards, ids = data
    assert list(found) == sorted(set(ids))
    for prompt, error in found.items():
        mine = [i for i, p in enumerate(ids) if p == prompt]
        alone = measure_health(values[mine], mask[mine], rewards[mine], [prompt] * len(mine), L)
        assert error == pytest.approx(alone.overall.mean_squared_error)


def test_drift_is_the_new_error_minus_the_old():
    own = measure_health(*rollouts(), L)
    following = measure_health(*rollouts(seed=3, noise=0.6, bias=0.5), L)
    found = drift(own, following)
    a, b = own.overall, following.overall
    assert found.mean_squared_error == pytest.approx(b.mean_squared_error - a.mean_squared_error)
    assert found.mean_squared_error > 0.2
    assert found.bias == pytest.approx(b.bias - a.bias)
    assert found.r_squared == pytest.approx(b.r_squared - a.r_squared)
    for k, error in enumerate(found.error_by_chunk):
        before, after = own.positions[k], following.positions[k]
        assert error == pytest.approx(after.mean_squared_error - before.mean_squared_error)
        assert found.bias_by_chunk[k] == pytest.approx(after.bias - before.bias)
    still = drift(own, own)
    assert (still.mean_squared_error, still.bias, still.r_squared) == (0, 0, 0)


def test_drift_has_no_number_where_one_side_has_none():
    values, mask, rewards, ids = rollouts()
    own = measure_health(values, mask, rewards, ids, L)
    short = mask & (np.arange(LONGEST + 1) <= L)
    following = measure_health(values, short, rewards, ids, L)
    assert drift(own, following).error_by_chunk[2:] == (None,) * (len(own.positions) - 2)


def test_drift_reaches_as_far_as_both_iterations_answers():
    """Texts in another tokenizer than the policy's have no common longest length."""
    values, mask, rewards, ids = rollouts()
    own = measure_health(values, mask, rewards, ids, L)
    short = (values[:, : L + 1], mask[:, : L + 1])
    following = measure_health(*short, rewards, ids, L)
    for a, b in ((own, following), (following, own)):
        found = drift(a, b)
        assert len(found.error_by_chunk) == len(found.bias_by_chunk) == 2 < len(own.positions)
        assert found.error_by_chunk[0] == 0
        assert found.mean_squared_error == pytest.approx(
            b.overall.mean_squared_error - a.overall.mean_squared_error
        )
    with pytest.raises(ValueError, match=f"chunk length. Got: {L} and {L + 1}"):
        drift(own, measure_health(values, mask, rewards, ids, L + 1))


def test_the_gap_between_rewards_in_standard_deviations_of_the_base_policy():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2, 80)) * [[2.0], [0.5]] + [[1.0], [3.0]]
    # The training reward gains one and two deviations; the second one a half, then nothing.
    scales = base.std(axis=1)
    training = base[0] + scales[0] * np.array([[0.0], [1.0], [2.0]])
    second = base[1] + scales[1] * np.array([[0.0], [0.5], [0.0]])
    found = reward_gap(training, second)
    assert [gap.mean for gap in found.gap] == pytest.approx([0, 0.5, 2])
    assert found.training == tuple(map(bootstrap, training))
    assert [interval.mean for interval in found.second] == pytest.approx(second.mean(axis=1))
    # A change of units changes nothing.
    rescaled = reward_gap(10 * training - 3, second / 7)
    assert [gap.low for gap in rescaled.gap] == pytest.approx([gap.low for gap in found.gap])


def test_a_reward_without_spread_has_no_gap():
    rewards = np.random.default_rng(0).normal(size=(2, 10))
    flat = np.stack([np.ones(10), rewards[1]])
    found = reward_gap(flat, rewards)
    assert found.gap == (None, None)
    assert found.training[0].mean == 1
    with pytest.raises(ValueError, match=r"same answers. Got: \(2, 10\) and \(2, 9\)"):
        reward_gap(rewards, rewards[:, :9])


def broken(change):
    values, mask, rewards, ids = rollouts()
    change(values, mask, rewards, ids)
    return values, mask, rewards, ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, m, r, i: i.pop(), r"Got: \(30, 19\), \(30, 19\), \(30,\), \(29,\)"),
        (lambda v, m, r, i: m.__setitem__((4, 0), False), r"gaps in row 4"),
        (lambda v, m, r, i: m.__setitem__((1, 5), False), r"gaps in row 1"),
        (lambda v, m, r, i: v.__setitem__((3, 0), np.nan), r"values must be finite.* row 3"),
        (lambda v, m, r, i: r.__setitem__(7, np.inf), r"rewards must be finite.* row 7"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        measure_health(*broken(change), L)


def test_no_rollouts_and_no_chunks_are_refused():
    values, mask, rewards, ids = rollouts()
    with pytest.raises(ValueError, match=r"n and length at least 1. Got: \(0, 19\)"):
        measure_health(values[:0], mask[:0], rewards[:0], ids[:0], L)
    with pytest.raises(ValueError, match=r"chunk_length must be at least 1. Got: 0"):
        measure_health(values, mask, rewards, ids, 0)
