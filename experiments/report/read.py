"""Runs as they lie on disk: results, costs, answers and trees, for one seed or several."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iro_jax.collect import TREES
from iro_jax.compare import UNGUIDED, MethodResult
from iro_jax.data import RolloutStore
from iro_jax.evaluation import Cost, Ledger, expected_best
from iro_jax.files import read_json
from iro_jax.workdir import WorkdirError


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed of a finished run.

    Attributes:
      folder: of the run.
      config: what it was started with.
      stages: what each stage has entered in the manifest, in order.
    """

    folder: Path
    config: dict[str, Any]
    stages: dict[str, Any]

    @functools.cached_property
    def results(self) -> list[MethodResult]:
        """Of every method."""
        return [
            MethodResult(
                fields["name"],
                np.asarray(fields["reward"]),
                None if fields["judge"] is None else np.asarray(fields["judge"]),
            )
            for stage in self.searches
            for fields in self.stages[f"eval/{stage}"]
        ]

    @property
    def searches(self) -> list[str]:
        """Of the evaluation, by name."""
        return [stage.removeprefix("eval/") for stage in self.stages if stage.startswith("eval/")]

    @functools.cached_property
    def search_of(self) -> dict[str, str]:
        """The search that each method's answers come from."""
        return {
            fields["name"]: name for name in self.searches for fields in self.stages[f"eval/{name}"]
        }

    @functools.cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / "cost.jsonl")

    def cost(self, search: str) -> Cost:
        """Of one search of the evaluation prompts."""
        return self.ledger.totals(stage=f"eval/{search}")

    def training_cost(self, iterations: int, *, compressed: bool = False) -> Cost:
        """Of so many value functions: their rollouts and fits."""
        total = Cost()
        for t in range(iterations):
            total += self.ledger.totals(stage=f"iter_{t}/rollouts")
            total += self.ledger.totals(stage=f"iter_{t}/value")
        return total + self.ledger.totals(stage="compressed") if compressed else total

    @property
    def num_prompts(self) -> int:
        """Of the evaluation."""
        return len(self.results[0].reward)

    @property
    def num_candidates(self) -> int:
        """U."""
        return self.config["search"]["beam_width"] * self.config["search"]["num_successors"]

    def answers(self, method: str) -> list[dict[str, Any]]:
        """Rows of `eval/<method>/outputs.jsonl`."""
        path = self.folder / "eval" / method / "outputs.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def metrics(self, method: str) -> dict[str, Any]:
        """`eval/<method>/metrics.json`."""
        return read_json(self.folder / "eval" / method / "metrics.json", WorkdirError)

    def trees(self, search: str) -> list[dict[str, Any]]:
        """The search trees of the first prompts; none where an older version did not keep them."""
        path = self.folder / "eval" / "searches" / search / TREES
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def best_of(self) -> dict[int, np.ndarray]:
        """Expected rewards of best-of-n for n = 1 .. U, by prompt."""
        store = RolloutStore.open(self.folder / "eval" / "searches" / UNGUIDED)
        found: dict[str, list[float]] = {}
        for rollout in store.all():
            found.setdefault(rollout.prompt.id, []).append(rollout.reward)
        counts = range(1, 1 + min(map(len, found.values())))
        return {n: np.asarray([expected_best(r, n) for r in found.values()]) for n in counts}


def read_runs(folder: Path) -> list[Run]:
    """The seeds of a run.

    Raises:
      WorkdirError: there is no run, or a seed of it has not been evaluated yet.
    """
    folders = sorted(folder.glob("seed_*"), key=lambda path: int(path.name[5:])) or [folder]
    return [_read(place) for place in folders]


def _read(folder: Path) -> Run:
    for name in ("config.json", "manifest.json"):
        if not (folder / name).exists():
            raise WorkdirError(f"{folder} holds no run whose report could be written: no {name}")
    config = read_json(folder / "config.json", WorkdirError)
    stages = read_json(folder / "manifest.json", WorkdirError)["stages"]
    if f"eval/{UNGUIDED}" not in stages:
        raise WorkdirError(f"{folder} has not been evaluated yet: run the same command again")
    return Run(folder, config, stages)


def common_methods(runs: Sequence[Run]) -> list[str]:
    """Methods that all seeds have, in the first one's order."""
    names = [{result.name for result in run.results} for run in runs]
    return [result.name for result in runs[0].results if all(result.name in n for n in names)]
