"""One run, end to end: `python -m experiments.run --config=configs/smollm2.py --workdir=DIR`.

Every field of the configuration can be overridden, as in `--config.search.chunk_length=8`, and
every config has variants, as in `--config=configs/smollm2.py:fast`. A run that was killed goes
on with the same command.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict

from experiments import command
from experiments.judging import endpoint_judge, judge_pairs
from experiments.report import write_page, write_report, write_table
from experiments.rivals import Arena, check_rivals, next_states, rivals
from experiments.tasks import Context, build_task, value_head
from iro_jax.collect import Collector, Guidance, SearchSettings
from iro_jax.compare import Comparison, MethodResult
from iro_jax.evaluation import Ledger
from iro_jax.iro import IRO, Learned, LoopSettings
from iro_jax.metrics import Metrics
from iro_jax.models import Sampling, TextFormat, from_pretrained
from iro_jax.rewards import ExactMatch
from iro_jax.schedules import betas
from iro_jax.search import SelectFn, diversity_first, per_parent, stochastic, top_k
from iro_jax.values import (
    FitSettings,
    ValueFitter,
    ValueFunction,
    ValueSettings,
)
from iro_jax.workdir import Workdir

_WANDB = flags.DEFINE_string("wandb", None, "Project of Weights & Biases to log to.")

_SELECTIONS: dict[str, SelectFn] = {
    "diversity_first": diversity_first,
    "top_k": top_k,
    "per_parent": per_parent,
}


def main(argv: Sequence[str]) -> None:
    config = command.CONFIG.value
    folder = Path(command.WORKDIR.value or Path("runs") / config.name)
    with command.started(argv):
        run(config, folder, progress=command.PROGRESS.value, wandb=_WANDB.value)


def run(
    config: ConfigDict, folder: Path, *, progress: bool, wandb: str | None = None
) -> list[list[MethodResult]]:
    """Runs a configuration once for each of its seeds, and writes the table of all of them."""
    results: list[list[MethodResult]] = []
    seeds = tuple(config.seeds) or (config.seed,)
    for seed in seeds:
        of_seed = ConfigDict(config.to_dict())
        of_seed.seed = seed
        place = folder if len(seeds) == 1 else folder / f"seed_{seed}"
        results.append(run_seed(of_seed, place, progress=progress, wandb=wandb))
    print(write_table(folder, results))
    try:
        print(f"The whole report: {write_page(folder)}")
    except ImportError as error:
        logging.warning("There is no page: %s", error)
    return results


def run_seed(
    config: ConfigDict, folder: Path, *, progress: bool, wandb: str | None = None
) -> list[MethodResult]:
    """Runs or continues one seed of a configuration."""
    start = time.perf_counter()
    # What is wrong with a configuration is told before anything is written.
    search, value, of_loop = (
        _search_settings(config),
        _value_settings(config),
        _loop_settings(config),
    )
    check_rivals(config)
    endpoint = endpoint_judge(config)
    fields = config.to_dict()
    fields.pop("seeds")
    workdir = Workdir(folder, fields)
    ledger = Ledger(workdir / "cost.jsonl")
    metrics = Metrics(
        workdir / "tensorboard", wandb_project=wandb, run_id=workdir.run_id, config=fields
    )
    policy = from_pretrained(config.policy.name, dtype=config.policy.dtype)
    assert policy.tokenizer is not None
    task = build_task(Context(config, policy, config.policy.name, workdir, ledger, progress))
    collector = Collector(
        policy,
        task.reward,
        dataclasses.replace(search, text_format=task.text_format),
        config_hash=workdir.config_hash,
        ledger=ledger,
        reward_reader=task.reward_reader,
        progress=progress,
    )
    loop = IRO(
        workdir,
        task.train,
        task.start,
        collector,
        ValueFitter(
            value,
            task.tokens,
            states=task.states,
            next_states=next_states(config, policy) if value.loss == "cdq" else None,
            progress=progress,
        ),
        of_loop,
        task=task.name,
        ledger=ledger,
        metrics=metrics,
    )
    loop.check(task.evaluation)
    learned = loop.run()
    vote = task.reward.vote if isinstance(task.reward, ExactMatch) else None
    comparison = Comparison(workdir, collector, task.judge, vote)
    searches = _searches(learned, task.prefix_reward, config)
    searches |= rivals(Arena(config, policy, task, loop, learned))
    results = comparison(task.evaluation, searches)
    write_report(workdir, ledger, results)
    judge_pairs(workdir, endpoint, results)
    metrics.close()
    print(f"{folder}: {time.perf_counter() - start:.0f} seconds in this process")
    return results


def _searches(
    learned: Learned, reward: ValueFunction | None, config: ConfigDict
) -> dict[str, Guidance]:
    """What is compared: each iteration, the compressed function, the reward on prefixes."""
    count = len(learned.functions)
    searches = {f"iteration_{t}": learned.guidance(t) for t in range(1, count + 1)}
    if learned.compressed is not None:
        searches["compressed"] = Guidance((learned.compressed,), (1.0,))
    if reward is not None and config.eval.reward_on_prefixes:
        searches["reward_on_prefixes"] = Guidance((reward,), (1.0,))
    return searches


def _search_settings(config: ConfigDict) -> SearchSettings:
    chosen = config.search.to_dict()
    sampling = Sampling(**chosen.pop("sampling"))
    text_format = TextFormat(**chosen.pop("text_format"))
    chosen["stop_strings"] = tuple(chosen["stop_strings"])
    chosen["select_fn"] = _select_fn(chosen.pop("select"))
    return SearchSettings(**chosen, sampling=sampling, text_format=text_format, seed=config.seed)


def _select_fn(name: str) -> SelectFn:
    """A selection by its name; `stochastic@0.5` has a temperature."""
    kind, _, temperature = name.partition("@")
    if kind == "stochastic" and re.fullmatch(r"\d*\.?\d+", temperature) and float(temperature):
        return functools.partial(stochastic, temperature=float(temperature))
    if name not in _SELECTIONS:
        known = (*_SELECTIONS, "stochastic@TEMPERATURE")
        raise ValueError(f"select must be one of {known}. Got: {name!r}")
    return _SELECTIONS[name]


def _loop_settings(config: ConfigDict) -> LoopSettings:
    chosen = config.loop.to_dict()
    select = chosen.pop("select")
    chosen["select_fn"] = None if select is None else _select_fn(select)
    of_each = betas(chosen.pop("betas"), chosen.pop("num_iterations"))
    return LoopSettings(**chosen, betas=tuple(of_each), seed=config.seed)


def _value_settings(config: ConfigDict) -> ValueSettings:
    chosen = config.value.to_dict()
    chosen.pop("backbone")
    chosen.pop("next_tokens")
    chosen["head"] = value_head(config.value)
    compression = chosen.pop("compression")
    chosen["targets"] = tuple(chosen["targets"])
    return ValueSettings(
        **chosen | {"fit": FitSettings(**chosen["fit"], seed=config.seed)},
        compression=None if compression is None else FitSettings(**compression, seed=config.seed),
        seed=config.seed,
    )


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
