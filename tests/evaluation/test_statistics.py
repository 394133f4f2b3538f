"""Intervals against numpy, scipy's normal theory, and their own promise: coverage."""

import numpy as np
import pytest
import scipy.stats

from iro_jax.evaluation import Interval, bootstrap, closes, gap_closed, markdown_table, paired


def rewards(seed=0, n=60):
    """Three methods on the same prompts, some of which are easier than others."""
    rng = np.random.default_rng(seed)
    prompt = rng.beta(2, 2, n)
    base = 0.6 * prompt + 0.05 * rng.normal(size=n)
    best = base + 0.3 + 0.1 * rng.normal(size=n)
    method = base + 0.7 * (best - base) + 0.05 * rng.normal(size=n)
    return base, method, best


def resampled(statistic, *columns, samples=20_000, seed=7):
    """The bootstrap distribution, one resample at a time."""
    rng = np.random.default_rng(seed)
    n = len(columns[0])
    draws = []
    for _ in range(samples):
        rows = rng.integers(n, size=n)
        draws.append(statistic(*(column[rows] for column in columns)))
    return np.quantile(draws, [0.025, 0.975])


def test_the_interval_of_a_mean_is_that_of_resampled_prompts():
    base, _, _ = rewards()
    found = bootstrap(base)
    assert found.mean == pytest.approx(base.mean())
    np.testing.assert_allclose(
        [found.low, found.high], resampled(np.mean, base), atol=0.03 * np.ptp(base)
    )


def test_the_ratios_interval_is_that_of_resampled_prompts():
    columns = rewards()

    def ratio(base, method, best):
        return (method - base).mean() / (best - base).mean()

    found = gap_closed(*columns)
    assert found.mean == pytest.approx(ratio(*columns))
    np.testing.assert_allclose([found.low, found.high], resampled(ratio, *columns), atol=0.004)


def test_many_prompts_give_the_normal_interval():
    values = np.random.default_rng(1).exponential(size=2000)
    low, high = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
    found = bootstrap(values)
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=0.004)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    trials = rng.beta(0.5, 1.0, size=(400, 100))
    intervals = [bootstrap(values, samples=400) for values in trials]
    covered = np.mean([found.low <= 1 / 3 <= found.high for found in intervals])
    # Three standard deviations of a share of 400 around 0.95, and a little for n = 100.
    assert 0.91 < covered < 0.98


def test_a_difference_without_effect_is_seldom_called_one():
    rng = np.random.default_rng(3)
    shared = rng.normal(size=(300, 1, 60))
    a, b = shared + rng.normal(size=(300, 2, 60)).transpose(1, 0, 2)[:, :, None]
    called = [paired(x, y, samples=400).excludes_zero for x, y in zip(a, b, strict=True)]
    assert np.mean(called) < 0.1


def test_pairing_takes_the_difficulty_of_the_prompts_out():
    base, method, _ = rewards()
    difference = paired(method, base)
    assert difference.mean == pytest.approx(method.mean() - base.mean())
    assert difference.excludes_zero
    assert difference.low > 0
    assert paired(base, method).high < 0
    width = difference.high - difference.low
    unpaired = np.sqrt(sum((x.high - x.low) ** 2 for x in map(bootstrap, (base, method))))
    assert width < 0.6 * unpaired


def test_several_seeds_count_as_their_mean_per_prompt():
    values = np.random.default_rng(4).normal(size=(3, 40))
    assert bootstrap(values) == bootstrap(values.mean(0))
    assert paired(values, values[:1]) == paired(values.mean(0), values[0])


def test_repeating_the_prompts_under_more_seeds_does_not_narrow_the_interval():
    values = np.random.default_rng(5).normal(size=40)
    assert bootstrap(np.tile(values, (4, 1))) == bootstrap(values)


def test_the_same_call_gives_the_same_interval():
    values = rewards()[0]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap(values, level=0.5).low > bootstrap(values).low


def test_the_share_that_is_closed_is_where_the_excess_changes_its_sign():
    base, method, best = rewards()
    share = gap_closed(base, method, best)
    assert closes(base, method, best, share.mean).mean == pytest.approx(0, abs=1e-12)
    assert closes(base, method, best, 0.5).low > 0
    assert closes(base, method, best, 0.9).high < 0
    # The same resamples decide both, so that the limits agree.
    assert closes(base, method, best, share.low - 1e-3).low > 0
    assert closes(base, method, best, share.low + 1e-3).low < 0


def test_a_gap_that_is_only_noise_has_no_share():
    rng = np.random.default_rng(6)
    base, method, best = rng.normal(size=(3, 50))
    assert gap_closed(base, method, best) is None
    assert np.isfinite(closes(base, method, best, 0.6).mean)


def test_equal_values_have_an_interval_without_width():
    assert bootstrap([0.25] * 10) == Interval(0.25, 0.25, 0.25)
    assert not paired([1.0, 2.0], [1.0, 2.0]).excludes_zero


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"at least two prompts.*Got: shape \(1,\)"),
        ([], r"at least two prompts.*Got: shape \(0,\)"),
        (np.zeros((2, 2, 2)), r"Got: shape \(2, 2, 2\)"),
        (np.zeros((0, 5)), r"Got: shape \(0, 5\)"),
        ([1.0, 2.0, np.nan], r"finite.*Got: nan at index \(2,\)"),
        ([[1.0, 2.0], [np.inf, 2.0]], r"finite.*Got: inf at index \(1, 0\)"),
    ],
)
def test_what_is_no_sample_of_prompts_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(values)


def test_unequal_numbers_of_prompts_are_refused():
    with pytest.raises(ValueError, match=r"same prompts. Got: \[3, 2\]"):
        paired([1.0, 2.0, 3.0], [1.0, 2.0])


def test_a_table_in_markdown():
    table = markdown_table(
        ["method", "reward"], [["a|b", f"{Interval(0.5, 0.25, 0.75):.2f}"], ["base", 3]]
    )
    assert table == (
        "| method | reward |\n|---|---:|\n| a\\|b | 0.50 (0.25 to 0.75) |\n| base | 3 |\n"
    )
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 (0.250 to 0.750)"
    with pytest.raises(ValueError, match=r"2 cells. Got: \('base',\)"):
        markdown_table(["method", "reward"], [["base"]])
