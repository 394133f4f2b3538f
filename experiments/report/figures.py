"""Pictures of a run's methods: reward against tokens, operations, time and budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from iro_jax.evaluation import Interval
from iro_jax.evaluation.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def methods(panels: Mapping[str, Mapping[str, Interval]], reference: str) -> Figure:
    """All methods below each other, a panel for each reward.

    Args:
      panels: by the reward's name, the interval of every method that has one.
      reference: the method that a line is drawn at.
    """
    names = list(dict.fromkeys(name for of_panel in panels.values() for name in of_panel))
    figure = new_figure(2.6 + 3.2 * len(panels), 0.8 + 0.27 * len(names))
    for place, (label, intervals) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        rows = [row for row, name in enumerate(names) if name in intervals]
        shown = [intervals[names[row]] for row in rows]
        axes.errorbar(
            [interval.mean for interval in shown],
            rows,
            xerr=_bars(shown),
            fmt="o",
            markersize=4,
            capsize=2,
        )
        if reference in intervals:
            axes.axvline(intervals[reference].mean, color="0.6", linewidth=1, linestyle="--")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names), fontsize=8)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlabel(label)
    return figure


def frontier(
    points: Mapping[str, tuple[Interval, Sequence[float]]],
    curve: Sequence[tuple[float, Sequence[float]]],
    labels: Sequence[str],
) -> Figure:
    """Reward of methods against several kinds of cost, a panel each.

    Args:
      points: reward and costs of each method.
      curve: reward and costs of best-of-n, for rising n.
      labels: of the costs.
    """
    figure = new_figure(4.4 * len(labels), 3.9)
    for panel, label in enumerate(labels):
        axes = figure.add_subplot(1, len(labels), panel + 1)
        axes.plot(
            [costs[panel] for _, costs in curve],
            [reward for reward, _ in curve],
            "-",
            color="#999999",
            label="best of 1, 2, 3, ...",
            zorder=1,
        )
        for index, (name, (interval, costs)) in enumerate(points.items()):
            marker = "os^Dv<>pP*Xd"[index % 12]
            axes.errorbar(
                [costs[panel]],
                [interval.mean],
                yerr=_bars([interval]),
                fmt=marker,
                markersize=5,
                capsize=2,
                linewidth=0.8,
                label=name,
            )
        axes.set_xlabel(label)
        axes.set_ylabel("reward")
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def budget(curve: Mapping[int, Interval], points: Mapping[str, tuple[int, Interval]]) -> Figure:
    """Reward against the number of candidates: best-of-n, and methods at their U."""
    figure = new_figure(5.6, 3.8)
    axes = figure.add_subplot()
    numbers = list(curve)
    axes.plot(numbers, [curve[n].mean for n in numbers], "o-", markersize=3, label="best of n")
    axes.fill_between(
        numbers, [curve[n].low for n in numbers], [curve[n].high for n in numbers], alpha=0.2
    )
    for index, (name, (candidates, interval)) in enumerate(points.items()):
        axes.errorbar(
            [candidates * (1 + 0.02 * index)],
            [interval.mean],
            yerr=_bars([interval]),
            fmt="s",
            capsize=2,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("candidates U")
    axes.set_ylabel("reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def sweep(title: str, points: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Reward of methods at each point of a sweep.

    Args:
      points: by their labels, each with the same methods.
    """
    figure = new_figure(max(5.0, 1.1 * len(points)), 4.0)
    axes = figure.add_subplot()
    labels = list(points)
    for shift, name in enumerate(points[labels[0]]):
        intervals = [points[label][name] for label in labels]
        axes.errorbar(
            [place + 0.08 * (shift - 1) for place in range(len(labels))],
            [interval.mean for interval in intervals],
            yerr=_bars(intervals),
            fmt="o-",
            markersize=4,
            capsize=2,
            linewidth=1,
            label=name,
        )
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_ylabel("reward")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def data_uri(figure: Figure) -> str:
    """A figure as the source of an image; the same figure gives the same text."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "iro_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """What `errorbar` takes for `yerr`."""
    return [
        [interval.mean - interval.low for interval in intervals],
        [interval.high - interval.mean for interval in intervals],
    ]
