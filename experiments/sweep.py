"""Runs that differ in one thing, and the picture of what it does: the paper's ablations.

    python -m experiments.sweep --config=configs/sweeps.py:chunk_length --workdir=runs/chunk_length

A sweep is a configuration and points, each with the fields that it changes. Every point is a run of
its own in the folder, with its own report; a killed sweep goes on with the same command.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app
from ml_collections import ConfigDict

from experiments import command
from experiments.report import figures, tables
from experiments.report.read import read_runs
from experiments.run import run
from iro_jax.compare import MethodResult
from iro_jax.evaluation import Interval, bootstrap, markdown_table
from iro_jax.files import write_atomic


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      label: in tables and pictures.
      changes: values of fields, by names such as `search.chunk_length`.
    """

    label: str
    changes: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.label)


def sweep(
    config: ConfigDict,
    points: Sequence[Point],
    folder: Path,
    *,
    title: str,
    progress: bool,
) -> str:
    """Runs or continues all points; returns the table.

    Raises:
      ValueError: a point changes a field that does not exist, or two have one label.
    """
    names = [point.folder for point in points]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"Every point of a sweep needs a label of its own. Got: {names}")
    configs = [changed_config(config, point) for point in points]
    found: dict[str, list[list[MethodResult]]] = {}
    for point, of_point in zip(points, configs, strict=True):
        found[point.label] = run(of_point, folder / point.folder, progress=progress)
    facts = {point.label: _reward_model(folder / point.folder) for point in points}
    text = f"# {title}\n\n" + _table(found, facts)
    write_atomic(folder / "sweep.md", text)
    write_atomic(folder / "sweep.json", json.dumps(_numbers(found), indent=1) + "\n")
    try:
        figure = figures.sweep(title, {name: _intervals(r) for name, r in found.items()})
        figure.savefig(folder / "sweep.png", dpi=150)
    except ImportError as error:
        logging.warning("The sweep has no picture: %s", error)
    return text


def changed_config(config: ConfigDict, point: Point) -> ConfigDict:
    """The configuration of a point.

    Raises:
      ValueError: it changes a field that does not exist.
    """
    changed = copy.deepcopy(config)
    for name, value in point.changes.items():
        *path, last = name.split(".")
        section = changed
        for part in path:
            if part not in section or not isinstance(section[part], ConfigDict):
                raise ValueError(f"{point.label}: there is no field {name!r}")
            section = section[part]
        if last not in section:
            raise ValueError(f"{point.label}: there is no field {name!r}")
        section[last] = value
    return changed


def _shown(rewards: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The methods that a sweep is about, by what it calls them: best-of-U, the last iteration."""
    last = max(
        (name for name in rewards if re.fullmatch(r"iro_\d+", name)),
        key=lambda name: int(name.removeprefix("iro_")),
    )
    chosen = (tables.best_of(rewards), last.replace("iro", "guided_sample"), last)
    # U may be what a sweep changes, and its methods have to be the same at all points.
    return dict(zip(("best of U", *chosen[1:]), chosen, strict=True))


def _intervals(seeds: Sequence[Sequence[MethodResult]]) -> dict[str, Interval]:
    rewards = tables.rewards_by_method(seeds)
    return {label: bootstrap(rewards[name]) for label, name in _shown(rewards).items()}


def _reward_model(folder: Path) -> str:
    """The share of held-out pairs that a point's reward model tells, where it trains one."""
    accuracy = (read_runs(folder)[0].stages.get("reward") or {}).get("pair_accuracy")
    return "" if accuracy is None else f"{accuracy:.3f}"


def _table(found: Mapping[str, Sequence[Sequence[MethodResult]]], facts: Mapping[str, str]) -> str:
    rows = []
    for label, seeds in found.items():
        judged = tables.judgements_by_method(seeds)
        rewards = tables.rewards_by_method(seeds)
        for shown, name in _shown(rewards).items():
            judge = str(bootstrap(judged[name])) if name in judged else ""
            rows.append((label, shown, str(bootstrap(rewards[name])), judge, facts[label]))
    header = ("point", "method", "reward (95%)", "judge (95%)", "pairs told by the reward model")
    return markdown_table(header, rows)


def _numbers(found: Mapping[str, Sequence[Sequence[MethodResult]]]) -> dict[str, Any]:
    """Means of all methods at all points."""
    return {
        label: {
            name: float(np.mean(numbers))
            for name, numbers in tables.rewards_by_method(seeds).items()
        }
        for label, seeds in found.items()
    }


def main(argv: Sequence[str]) -> None:
    chosen = command.CONFIG.value
    folder = Path(command.WORKDIR.value or Path("runs") / f"sweep_{chosen.name}")
    with command.started(argv):
        points = [Point(label, dict(changes)) for label, changes in chosen.points]
        progress = command.PROGRESS.value
        print(sweep(chosen.run, points, folder, title=chosen.title, progress=progress))


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
