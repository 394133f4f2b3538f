"""Pictures of the health of value functions, of rewards over iterations, and of losses.

Each function returns a `matplotlib.figure.Figure` of its own; nothing touches pyplot's global
state or needs a display. `save_health_plots` writes all that there is data for. Matplotlib is an
optional dependency, imported when the first picture is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from iro_jax.evaluation.health import Drift, Health, RewardGap
from iro_jax.evaluation.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = (4.6, 3.6)  # inches
_NAN = float("nan")  # which matplotlib leaves out of a line
_T = TypeVar("_T")


def calibration_plot(healths: Mapping[str, Health]) -> Figure:
    """Mean reward against mean prediction of each decile; the diagonal is perfect.

    Args:
      healths: by what the legend calls them, in order.
    """
    figure, (axes,) = _figure(1)
    for (label, health), color in _colored(healths):
        predicted = [group.predicted for group in health.deciles]
        rewards = [group.reward for group in health.deciles]
        axes.plot(predicted, rewards, "o-", color=color, markersize=3, label=label)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="grey", linewidth=0.8, linestyle="--", zorder=0)
    return _finished(figure, axes, "predicted value, by decile", "mean reward")


def position_plot(healths: Mapping[str, Health]) -> Figure:
    """Bias and error of the values by their position in the answer, chunk 0 the bare prompt.

    The error is relative to the variance of the same rewards: 1 is a constant's.
    """
    figure, (bias, error) = _figure(2)
    for (label, health), color in _colored(healths):
        chunks = range(len(health.positions))
        shares = [None if fit.r_squared is None else 1 - fit.r_squared for fit in health.positions]
        biases = [fit.bias for fit in health.positions]
        bias.plot(chunks, _numbers(biases), "o-", color=color, markersize=3, label=label)
        error.plot(chunks, _numbers(shares), "o-", color=color, markersize=3, label=label)
    bias.axhline(0, color="grey", linewidth=0.8, linestyle="--", zorder=0)
    error.axhline(1, color="grey", linewidth=0.8, linestyle="--", zorder=0)
    _finished(figure, bias, "chunk of the answer", "bias (value - reward)")
    return _finished(figure, error, "chunk of the answer", "squared error / reward variance")


def correlation_plot(healths: Mapping[str, Health]) -> Figure:
    """Correlation of the value at each chunk's end with the final reward.

    Over all rollouts (solid), and among rollouts of the same prompt (dashed).
    """
    figure, (axes,) = _figure(1)
    for (label, health), color in _colored(healths):
        chunks = range(len(health.boundaries))
        everywhere = [fit.pearson for fit in health.boundaries]
        within = [fit.within_prompt for fit in health.boundaries]
        axes.plot(chunks, _numbers(everywhere), "o-", color=color, markersize=3, label=label)
        axes.plot(chunks, _numbers(within), "o--", color=color, markersize=3)
    axes.plot([], [], "--", color="grey", label="within prompts")
    axes.axhline(0, color="grey", linewidth=0.8, zorder=0)
    return _finished(figure, axes, "chunk of the answer", "correlation with the reward")


def drift_plot(drifts: Mapping[str, Drift]) -> Figure:
    """By how much error and bias rise on the next iteration's rollouts, by chunk."""
    figure, (error, bias) = _figure(2)
    for (label, drift), color in _colored(drifts):
        for axes, changes in ((error, drift.error_by_chunk), (bias, drift.bias_by_chunk)):
            chunks = range(len(changes))
            axes.plot(chunks, _numbers(changes), "o-", color=color, markersize=3, label=label)
    for axes, name in ((error, "squared error"), (bias, "bias")):
        axes.axhline(0, color="grey", linewidth=0.8, linestyle="--", zorder=0)
        _finished(figure, axes, "chunk of the answer", f"change of the {name}")
    return figure


def reward_plot(gap: RewardGap) -> Figure:
    """Training reward, second reward and the gap between their gains, over iterations."""
    figure, panels = _figure(3)
    rows = (
        ("training reward", gap.training),
        ("second reward", gap.second),
        ("gap of the gains (standard deviations)", gap.gap),
    )
    for axes, (name, intervals) in zip(panels, rows, strict=True):
        _with_intervals(axes, intervals)
        axes.set_xticks(range(len(intervals)), ["base", *map(str, range(1, len(intervals)))])
        _finished(figure, axes, "iteration", name, legend=False)
    panels[-1].axhline(0, color="grey", linewidth=0.8, linestyle="--", zorder=0)
    return figure


def loss_plot(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Losses over optimisation steps.

    Args:
      curves: steps and losses, by what the legend calls them; a name that ends in `held-out` is
        dashed.
    """
    figure, (axes,) = _figure(1)
    for (label, (steps, losses)), color in _colored(curves):
        style = "--" if label.endswith("held-out") else "-"
        axes.plot(steps, losses, style, color=color, linewidth=1.2, label=label)
    return _finished(figure, axes, "step", "loss")


def save_health_plots(
    folder: str | os.PathLike[str],
    healths: Mapping[str, Health],
    *,
    drifts: Mapping[str, Drift] | None = None,
    gap: RewardGap | None = None,
    losses: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> list[Path]:
    """Writes PNG files of everything that there is data for, and returns their paths.

    Args:
      folder: is made if it is not there; pictures of the same names are replaced.
      healths, drifts, losses: by what the legends call them, such as `iteration 1`.
      gap: rewards over iterations.

    Raises:
      ImportError: matplotlib is not installed.
    """
    draw: dict[str, Callable[[], Figure]] = {}
    if healths:
        draw["calibration"] = lambda: calibration_plot(healths)
        draw["position"] = lambda: position_plot(healths)
        draw["correlation"] = lambda: correlation_plot(healths)
    if drifts:
        draw["drift"] = lambda: drift_plot(drifts)
    if gap is not None:
        draw["rewards"] = lambda: reward_plot(gap)
    if losses:
        draw["losses"] = lambda: loss_plot(losses)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in draw.items():
        paths.append(folder / f"{name}.png")
        figure().savefig(paths[-1], dpi=150)
    return paths


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Pictures need matplotlib: pip install -e ".[plots]", or pip install matplotlib.'
            f" Got: {error}"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    width, height = _PANEL
    figure = new_figure(panels * width, height)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _colored(items: Mapping[str, _T]) -> Iterator[tuple[tuple[str, _T], tuple[float, ...]]]:
    """Items with colours from dark to light, so that the order of iterations can be seen."""
    from matplotlib import colormaps

    for index, item in enumerate(items.items()):
        yield item, colormaps["viridis"](0.85 * index / max(len(items) - 1, 1))


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [_NAN if value is None else value for value in values]


def _with_intervals(axes: Axes, intervals: Sequence[Interval | None]) -> None:
    known = [(i, interval) for i, interval in enumerate(intervals) if interval is not None]
    if not known:
        return
    below = [interval.mean - interval.low for _, interval in known]
    above = [interval.high - interval.mean for _, interval in known]
    means = [interval.mean for _, interval in known]
    axes.errorbar([i for i, _ in known], means, yerr=[below, above], fmt="o-", capsize=3)


def _finished(figure: Figure, axes: Axes, x: str, y: str, *, legend: bool = True) -> Figure:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8)
    return figure
