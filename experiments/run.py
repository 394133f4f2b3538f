"""One run, end to end: `python -m experiments.run --config=configs/smollm2.py --workdir=DIR`.

Every field of the configuration can be overridden, as in `--config.search.chunk_length=8`, and
every config has variants, as in `--config=configs/smollm2.py:fast`. A run that was killed goes
on with the same command. Several hosts run it together with `--distributed`, see
`experiments/README.md`.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict

from experiments import command
from experiments.devices import devices_of
from experiments.judging import endpoint_judge, judge_pairs
from experiments.report import write_page, write_report, write_sets, write_table
from experiments.rivals import Arena, check_rivals, next_states, rivals
from experiments.settings import loop_settings, search_settings, value_settings
from experiments.sources import check_sources, policy_source
from experiments.tasks import Context, build_task
from iro_jax import hosts
from iro_jax.collect import Collector, Guidance
from iro_jax.compare import Comparison, MethodResult
from iro_jax.evaluation import Ledger
from iro_jax.iro import IRO, Learned
from iro_jax.metrics import Metrics
from iro_jax.rewards import ExactMatch
from iro_jax.values import ValueFitter, ValueFunction
from iro_jax.workdir import Workdir

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several hosts run this command together, with one shared workdir."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "ADDRESS:PORT of the first host, where JAX does not find the hosts itself."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many hosts there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this one.")
_WANDB = flags.DEFINE_string("wandb", None, "Project of Weights & Biases to log to.")


def main(argv: Sequence[str]) -> None:
    config = command.CONFIG.value
    folder = Path(command.WORKDIR.value or Path("runs") / config.name)
    with command.started(argv):
        if _DISTRIBUTED.value or _COORDINATOR.value is not None:
            hosts.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    with hosts.leaving_at_errors(), command.started(argv):
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
        gc.unfreeze()  # what the seed has left may go
    if hosts.first():
        print(write_table(folder, results))
        try:
            print(f"The whole report: {write_page(folder)}")
        except ImportError as error:
            logging.warning("There is no page: %s", error)
    hosts.meet("end")
    return results


def run_seed(
    config: ConfigDict, folder: Path, *, progress: bool, wandb: str | None = None
) -> list[MethodResult]:
    """Runs or continues one seed of a configuration."""
    start = time.perf_counter()
    # What is wrong with a configuration is told before anything is written.
    search, value, of_loop = (
        search_settings(config),
        value_settings(config),
        loop_settings(config),
    )
    check_sources(config)
    check_rivals(config)
    endpoint = endpoint_judge(config)
    devices = devices_of(config)
    fields = config.to_dict()
    # A run may go on on other devices.
    for name in ("seeds", "mesh"):
        fields.pop(name)
    workdir = Workdir(folder, fields)
    ledger = Ledger(workdir / "cost.jsonl", hosts.index())
    progress = progress and hosts.first()
    metrics = Metrics(
        workdir / "tensorboard", wandb_project=wandb, run_id=workdir.run_id, config=fields
    )
    place = policy_source(config).place
    policy = devices.load_policy(place, config.policy.dtype)
    assert policy.tokenizer is not None
    task = build_task(Context(config, policy, place, workdir, ledger, progress, devices))
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
            mesh=devices.mesh,
            progress=progress,
        ),
        of_loop,
        task=task.name,
        ledger=ledger,
        metrics=metrics,
    )
    command.spare_collector()
    loop.check(task.evaluation)
    learned = loop.run()
    vote = task.reward.vote if isinstance(task.reward, ExactMatch) else None
    comparison = Comparison(workdir, collector, task.judge, vote)
    searches = _searches(learned, task.prefix_reward, config)
    searches |= rivals(Arena(config, policy, task, loop, learned))
    results = comparison(task.evaluation, searches)
    if hosts.first():
        write_report(workdir, ledger, results)
        write_sets(workdir, [prompt.id for prompt in task.evaluation], task.sets, results)
        judge_pairs(workdir.alone(), endpoint, results)
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


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
