"""The reward model of a configuration alone, on a machine without the policy.

    python -m experiments.train_reward --config=configs/ultrafeedback.py --workdir=runs/reward
    python -m experiments.run ... --config.task.reward.path=runs/reward/reward/export

The configuration's reward has to be of the kind `pairs` and to train all weights of a backbone of
its own. A finished one is not trained again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app
from ml_collections import ConfigDict

from experiments import command
from experiments.sources import check_reward_sources, dataset_source, trains_reward, value_source
from experiments.tasks.preferences import train_reward
from iro_jax.models import from_pretrained
from iro_jax.workdir import Workdir

STAGE = "reward"


def run(config: ConfigDict, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Trains the reward model; returns how many pairs it tells right.

    Raises:
      ValueError: the run of this configuration would train no such reward model.
      SourceError: the backbone or the pairs are not here.
    """
    source = value_source(config)
    if not trains_reward(config) or config.task.reward.trainable != "all" or source is None:
        raise ValueError(
            "task.reward must be of the kind 'pairs', without a path, train 'all', and have a"
            f" backbone of its own. Got: {config.task.reward.get('kind')!r} on"
            f" {config.value.backbone!r}"
        )
    check_reward_sources(config)
    fields = {name: config[name].to_dict() for name in ("task", "value")}
    workdir = Workdir(folder, {"seed": config.seed} | fields)
    if not workdir.done(STAGE):
        facts = train_reward(
            config.task.reward,
            dataset_source(config.task.reward.pairs, "task.reward.pairs").place,
            from_pretrained(source.place, dtype="float32"),
            workdir / STAGE,
            name=source.place,
            seed=config.seed,
            progress=progress,
        )
        workdir.finish(STAGE, facts)
    return workdir.result(STAGE)


def main(argv: Sequence[str]) -> None:
    config = command.CONFIG.value
    folder = Path(command.WORKDIR.value or Path("runs") / f"{config.name}_reward")
    with command.started(argv):
        facts = run(config, folder, progress=command.PROGRESS.value)
        print(
            f"{folder / STAGE / 'export'}: {facts['pair_accuracy']:.3f} of {facts['held_out']}"
            f" pairs told right, trained on {facts['pairs']}"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
