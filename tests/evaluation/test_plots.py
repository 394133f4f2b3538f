"""Pictures show the numbers of the health, and need no display."""

import builtins
import math

import numpy as np
import pytest

from iro_jax.evaluation import drift, measure_health, plots, reward_gap, save_health_plots
from tests.evaluation.test_health import L, rollouts

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def healths():
    return {f"iteration {i}": measure_health(*rollouts(seed=i), L) for i in (1, 2, 3)}


def line(axes, label):
    [found] = [one for one in axes.lines if one.get_label() == label]
    return found


def test_the_calibration_shows_the_deciles(healths):
    [axes] = plots.calibration_plot(healths).axes
    for label, health in healths.items():
        shown = line(axes, label).get_xydata()
        assert shown.tolist() == [[group.predicted, group.reward] for group in health.deciles]


def test_positions_show_bias_and_the_share_of_variance_left(healths):
    bias, error = plots.position_plot(healths).axes
    health = healths["iteration 2"]
    assert list(line(bias, "iteration 2").get_ydata()) == [fit.bias for fit in health.positions]
    shares = [fit.mean_squared_error / fit.reward_variance for fit in health.positions[:-1]]
    shown = list(line(error, "iteration 2").get_ydata())
    assert shown[: len(shares)] == pytest.approx(shares)
    # Only one rollout is so long that it ends in the last chunk: its reward has no variance.
    assert [math.isnan(share) for share in shown[len(shares) :]] == [True]


def test_what_is_not_known_is_left_out():
    values, mask, rewards, ids = rollouts()
    wide = np.pad(mask, [(0, 0), (0, L)])
    health = measure_health(np.pad(values, [(0, 0), (0, L)]), wide, rewards, ids, L)
    [axes] = plots.correlation_plot({"one": health}).axes
    shown = line(axes, "one").get_ydata()
    assert math.isnan(shown[-1])
    assert shown[1] == health.boundaries[1].pearson


def test_a_legend_names_everything_in_order(healths):
    [axes] = plots.correlation_plot(healths).axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [*healths, "within prompts"]


def test_all_pictures_are_written_and_replaced(tmp_path, healths):
    first, second, _ = healths.values()
    rewards = np.random.default_rng(0).normal(size=(3, 20))
    everything = {
        "drifts": {"iteration 1 on 2": drift(first, second)},
        "gap": reward_gap(rewards, rewards[::-1]),
        "losses": {
            "training": (range(5), [5.0, 4, 3, 2, 1]),
            "held-out": (range(5), [5.0, 4, 4, 4, 5]),
        },
    }
    folder = tmp_path / "report" / "plots"
    folder.mkdir(parents=True)
    (folder / "drift.png").write_bytes(b"of an earlier run")
    paths = save_health_plots(folder, healths, **everything)
    assert sorted(paths) == sorted(folder.iterdir())
    assert [path.stem for path in paths] == [
        *("calibration", "position", "correlation", "drift", "rewards", "losses")
    ]
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_only_what_there_is_data_for_is_drawn(tmp_path):
    flat = np.ones((2, 5))
    [path] = save_health_plots(tmp_path, {}, gap=reward_gap(flat, flat))
    assert path.name == "rewards.png"


def test_no_global_figure_is_left_behind(healths):
    import sys

    plots.calibration_plot(healths)
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, healths, monkeypatch):
    original = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"\[plots\].*Got: No module named 'matplotlib"):
        save_health_plots(tmp_path, healths)
