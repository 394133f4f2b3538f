"""Algorithm 3: the loop that ties the rooms together.

    for t in 0 .. T-1:
        rollouts   answers to a fresh subset of prompts, guided by V_0 .. V_{t-1}, with rewards
        value      V_t, fitted to them; its health on held-out prompts
    compress       one V for the sum of all (equation 10)

Every stage leaves its results in the run's folder and may be killed at any moment: the same
call goes on, and ends in the same rollouts and value functions, bit for bit on one machine.
What is learned with, the networks, losses and searches, is made elsewhere and handed in.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from iro_jax import hosts
from iro_jax.collect import Collector, Guidance, function_reader
from iro_jax.data import Prompt, Rollout, RolloutStore, choose, split_by_prompt, subset
from iro_jax.evaluation import Cost, Health, Ledger, Reader, drift, measure_health
from iro_jax.metrics import Metrics
from iro_jax.models.sharding import mesh_of
from iro_jax.search import SelectFn
from iro_jax.values import (
    Epoch,
    FittedFunction,
    ValueFitter,
    ValueFunction,
    from_pretrained,
    save_value,
)
from iro_jax.values.card import value_card
from iro_jax.workdir import Workdir

DatasetName = Literal["best", "all", "one"]


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """The outer loop.

    Attributes:
      betas: beta_t of each iteration; their number is T.
      prompts_per_iteration: m, prompts of each iteration's fresh subset.
      dataset: which of a prompt's candidates V_t is fitted to; `iro_jax.data.choose` has figures.
      mixed_only: leave out prompts whose candidates are all right or all wrong.
      held_out: share of the prompts that fits do not train on.
      select_fn: which candidates survive in the searches for rollouts; None for those of the
        search. `per_parent` gives rollouts that share fewer prefixes, which teaches more.
      warm_start: whether V_t starts from V_{t-1}, as in the paper, rather than from what V_0
        started from.
      compress: whether to fit one value function to the sum of all.
      seed: of subsets, splits and fits.
    """

    betas: tuple[float, ...] = (1.0, 1.0, 1.0)
    prompts_per_iteration: int = 8192
    dataset: DatasetName = "all"
    mixed_only: bool = False
    held_out: float = 0.1
    select_fn: SelectFn | None = None
    warm_start: bool = True
    compress: bool = True
    seed: int = 0

    def __post_init__(self):
        if not self.betas or not all(0 < beta < math.inf for beta in self.betas):
            raise ValueError(f"betas must be positive numbers, at least one. Got: {self.betas}")
        if self.dataset not in get_args(DatasetName):
            raise ValueError(
                f"dataset must be one of {get_args(DatasetName)}. Got: {self.dataset!r}"
            )
        if self.prompts_per_iteration < 2:
            raise ValueError(
                "prompts_per_iteration must be at least 2, since some are held out."
                f" Got: {self.prompts_per_iteration}"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1. Got: {self.held_out}")

    @property
    def num_iterations(self) -> int:
        """T."""
        return len(self.betas)


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a run has learned.

    Attributes:
      functions: V_0 .. V_{T-1}.
      betas: of each of them.
      compressed: one for their sum, to be used with beta = 1, or None.
    """

    functions: tuple[ValueFunction, ...]
    betas: tuple[float, ...]
    compressed: ValueFunction | None

    def guidance(self, iterations: int) -> Guidance:
        """The search after so many iterations: guided by V_0 .. V_{iterations-1}."""
        return Guidance(self.functions[:iterations], self.betas[:iterations])


class IRO:
    """The loop, bound to a folder.

    Args:
      workdir: of the run.
      prompts: all prompts there are to train on.
      start: the value function, or reward model, from which V_0 starts.
      collector: searches, scores and stores.
      fitter: fits value functions.
      settings: of the loop.
      task: what the rewards are of, for the value functions' model cards.
      ledger: where costs are written down.
      metrics: where curves are drawn.
    """

    def __init__(
        self,
        workdir: Workdir,
        prompts: Sequence[Prompt],
        start: ValueFunction,
        collector: Collector,
        fitter: ValueFitter,
        settings: LoopSettings,
        *,
        task: str,
        ledger: Ledger,
        metrics: Metrics,
    ):
        if settings.prompts_per_iteration > len(prompts):
            raise ValueError(
                "prompts_per_iteration must be at most the number of prompts, "
                f"{len(prompts)}. Got: {settings.prompts_per_iteration}"
            )
        self.workdir = workdir
        self.prompts = prompts
        self.start = start
        self.collector = collector
        self.fitter = fitter
        self.settings = settings
        self.task = task
        self.ledger = ledger
        self.metrics = metrics

    def check(self, evaluation: Sequence[Prompt] = ()) -> None:
        """Looks for what would stop the run after long work.

        Args:
          evaluation: prompts that will be searched afterwards.

        Raises:
          ValueError: a prompt is empty or too long, or the loss does not go with the head.
        """
        chosen = range(self.settings.num_iterations)
        prompts = [prompt for iteration in chosen for prompt in self._subset(iteration)]
        self.collector.check([*prompts, *evaluation])
        self.fitter.tokens.check([*prompts, *evaluation])
        self.fitter.check(self.start, compress=self.settings.compress)

    def run(self) -> Learned:
        """Runs or continues the loop."""
        functions: list[ValueFunction] = []
        betas = self.settings.betas
        for iteration in range(self.settings.num_iterations):
            guidance = Guidance(tuple(functions), betas[:iteration])
            store = self._rollouts(iteration, guidance)
            functions.append(self._value(iteration, store, functions))
        compressed = self._compress(functions) if self.settings.compress else None
        return Learned(tuple(functions), betas, compressed)

    def store(self, iteration: int) -> RolloutStore:
        """The rollouts of an iteration that is done."""
        return RolloutStore.open(self._folder(iteration) / "rollouts")

    def fit_other(self, stage: str, fitter: ValueFitter) -> ValueFunction:
        """Another kind of value function, fitted to the policy's own rollouts: a stage of the run.

        Args:
          stage: its name, and that of its folder.
          fitter: says what kind.
        """
        folder = self.workdir / stage
        if not self.workdir.done(stage):
            train, held_out = self._dataset(self.store(0))
            with self.ledger.measure(stage, "fit", "training") as cost:
                fitted = fitter(
                    self.start,
                    [self.store(0)],
                    train,
                    held_out,
                    folder=folder,
                    desc=stage,
                    on_epoch=lambda line: self._draw(stage, line),
                )
                self._bill(cost, fitted, new_states=True)
            facts = self._facts(fitted, train, held_out)
            self._export(fitted.function, stage, folder, facts)
            self.workdir.finish(stage, facts)
        return self._load(folder)

    def _folder(self, iteration: int) -> Path:
        return self.workdir / f"iter_{iteration}"

    def _rollouts(self, iteration: int, guidance: Guidance) -> RolloutStore:
        stage = f"iter_{iteration}/rollouts"
        store = self.collector(
            self._folder(iteration) / "rollouts",
            self._subset(iteration),
            guidance,
            stage=stage,
            phase="training",
            iteration=iteration,
            select_fn=self.settings.select_fn,
        )
        if not self.workdir.done(stage):
            rewards = np.asarray([rollout.reward for rollout in store.all()])
            facts = {"rollouts": len(store), "mean_reward": float(rewards.mean())}
            self.metrics.write(stage, iteration, facts)
            self.workdir.finish(stage, facts)
        return store

    def _subset(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration."""
        chosen = self.settings
        return subset(self.prompts, iteration, chosen.prompts_per_iteration, chosen.seed)

    def _value(
        self, iteration: int, store: RolloutStore, earlier: Sequence[ValueFunction]
    ) -> ValueFunction:
        stage = _value_stage(iteration)
        folder = self._folder(iteration) / "value"
        if not self.workdir.done(stage):
            start = earlier[-1] if earlier and self.settings.warm_start else self.start
            train, held_out = self._dataset(store)
            with self.ledger.measure(stage, "fit", "training") as cost:
                fitted = self.fitter(
                    start,
                    [store],
                    train,
                    held_out,
                    folder=folder,
                    desc=stage,
                    on_epoch=lambda line: self._draw(stage, line),
                )
                self._bill(cost, fitted, new_states=True)
            with self.ledger.measure(stage, "health", "training") as cost:
                report = self._health(fitted.function, store, cost)
                after = self._health(earlier[-1], store, cost) if earlier else None
            facts = self._facts(fitted, train, held_out)
            facts |= {
                "health": report.to_json(),
                "deciles": [
                    {"predicted": b.predicted, "observed": b.reward, "count": b.count}
                    for b in report.deciles
                ],
            }
            if after is not None:
                before = Health.from_json(
                    self.workdir.result(_value_stage(iteration - 1))["health"]
                )
                facts["drift_of_previous"] = dataclasses.asdict(drift(before, after))
            self._export(fitted.function, stage, folder, facts)
            self.metrics.write("health", iteration, _scalars(report))
            self.workdir.finish(stage, facts)
        return self._load(folder)

    def _compress(self, functions: Sequence[ValueFunction]) -> ValueFunction:
        stage, folder = "compressed", self.workdir / "compressed"
        if not self.workdir.done(stage):
            stores = [self.store(t) for t in range(self.settings.num_iterations)]
            parts = [self._dataset(store, which="all") for store in stores]
            train = [rollout for part, _ in parts for rollout in part]
            held_out = [rollout for _, part in parts for rollout in part]
            with self.ledger.measure(stage, "fit", "training") as cost:
                fitted = self.fitter.compress(
                    functions,
                    self.settings.betas,
                    stores,
                    train,
                    held_out,
                    folder=folder,
                    on_epoch=lambda line: self._draw(stage, line),
                )
                self._bill(cost, fitted, new_states=False)
                for function in functions:
                    self._bill_values(cost, function, fitted.lengths)
            facts = self._facts(fitted, train, held_out)
            self._export(fitted.function, stage, folder, facts)
            self.workdir.finish(stage, facts)
        return self._load(folder)

    def _dataset(
        self, store: RolloutStore, which: DatasetName | None = None
    ) -> tuple[list[Rollout], list[Rollout]]:
        chosen = self.settings
        rollouts = choose(
            store.all(),
            which or chosen.dataset,
            seed=chosen.seed,
            mixed_only=chosen.mixed_only and which is None,
        )
        return split_by_prompt(rollouts, chosen.held_out, chosen.seed)

    def _health(self, function: ValueFunction, store: RolloutStore, cost: Cost) -> Health:
        """Of a value function on all candidates of the prompts that its fit did not train on."""
        _, rollouts = self._dataset(store, which="all")
        values = self.fitter.values(function, [store], rollouts)
        length = max(self.collector.settings.max_new_tokens + 1, *map(len, values))
        lengths = [len(r.prompt_tokens) + len(x) - 1 for r, x in zip(rollouts, values, strict=True)]
        self._bill_values(cost, function, np.asarray(lengths))
        return measure_health(
            np.stack([np.pad(x, (0, length - len(x))) for x in values]),
            np.arange(length) < np.asarray([len(x) for x in values])[:, None],
            np.asarray([rollout.reward for rollout in rollouts]),
            [rollout.prompt.id for rollout in rollouts],
            self.collector.settings.chunk_length,
        )

    def _facts(
        self, fitted: FittedFunction, train: Sequence[Rollout], held_out: Sequence[Rollout]
    ) -> dict[str, Any]:
        return {
            "train": len(train),
            "held_out": len(held_out),
            "best_epoch": fitted.best_epoch,
            "curve": [line.to_json() for line in fitted.curve],
        }

    def _bill(self, cost: Cost, fitted: FittedFunction, *, new_states: bool) -> None:
        """Forward and backward passes of every epoch.

        A head on remembered hidden states is all that is computed again; `new_states` says whether
        they are read for this fit, unless the reward has read them.
        """
        reader = function_reader(fitted.function)
        if fitted.next_tokens:
            # CD-Q reads the answers for what the policy would say next, and all of that.
            context = np.full(fitted.next_tokens, fitted.lengths.mean())
            policy = Reader(self.collector.policy.network.config, logits=True)
            cost.tokens_read += int(fitted.lengths.sum()) + fitted.next_tokens
            cost.value_flops += policy.flops(fitted.lengths) + reader.flops(1, context)
        if self._heads_only(fitted.function):
            head = dataclasses.replace(reader, layers=0)
            cost.value_flops += 3 * fitted.epochs * head.flops(fitted.prefixes)
            if new_states and getattr(self.collector.reward, "states", None) is None:
                cost.tokens_read += int(fitted.lengths.sum())
                cost.value_flops += reader.flops(fitted.lengths)
        else:
            cost.tokens_read += fitted.epochs * int(fitted.lengths.sum())
            cost.value_flops += 3 * fitted.epochs * reader.flops(fitted.lengths)

    def _bill_values(self, cost: Cost, function: ValueFunction, lengths: np.ndarray) -> None:
        """One pass over whole answers, unless a head finds their hidden states remembered."""
        if not self._heads_only(function):
            cost.tokens_read += int(lengths.sum())
            cost.value_flops += function_reader(function).flops(lengths)

    def _heads_only(self, function: ValueFunction) -> bool:
        return self.fitter.states is not None and self.fitter.states.serves(function)

    def _draw(self, stage: str, line: Epoch) -> None:
        numbers = {"train_loss": line.train_loss, "held_out_loss": line.held_out_loss}
        if line.throughput is not None:
            numbers |= line.throughput.numbers()
        self.metrics.write(stage, line.epoch, numbers)

    def _export(
        self, function: ValueFunction, stage: str, folder: Path, facts: dict[str, Any]
    ) -> None:
        if not hosts.first():
            return
        target = folder / "export"
        if target.exists():
            logging.info("%s was not entered as done: it is written again", target)
            shutil.rmtree(target)
        for unfinished in folder.glob(f".{target.name}-*"):
            shutil.rmtree(unfinished)
        save_value(function, target, card=value_card(self.task, stage, function, facts))

    def _load(self, folder: Path) -> ValueFunction:
        """A function from its export: a continued run searches with what it finds on disk."""
        start = self.start
        return from_pretrained(
            folder / "export",
            backbone=start.model if start.frozen else None,
            mesh=mesh_of(start.model.params),
            rules=start.network.network.rules,
        )


def _value_stage(iteration: int) -> str:
    return f"iter_{iteration}/value"


def _scalars(health: Health) -> dict[str, float]:
    numbers = {
        "mean_reward": health.mean_reward,
        "reward_variance": health.reward_variance,
        "mean_squared_error": health.overall.mean_squared_error,
        "r_squared": health.overall.r_squared,
        "within_prompt_correlation": health.overall.within_prompt,
        "calibration_error": health.calibration_error,
    }
    return {name: number for name, number in numbers.items() if number is not None}
