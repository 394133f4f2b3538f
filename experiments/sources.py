"""Where a configuration's models and datasets are: names on the hub, or local copies.

    policy.name                      policy.path
    value.backbone                   value.backbone_path
    task.reward.target               task.reward.path           and the same for task.judge
    task.train.source                task.train.path            and for other prompts and pairs
    eval.tuned, eval.untuned         the same fields

A path is read instead of the name beside it. `check_sources` looks for all of them before a run
writes anything, and says which files are missing and which flag points to a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from iro_jax.data import MissingSourceError
from iro_jax.data.sources import rows
from iro_jax.models import HubError
from iro_jax.models.weights import open_checkpoint

LOG_RATIO_RIVALS = ("implicit_best_of_n", "weak_to_strong")


class SourceError(ValueError):
    """Models or datasets that are not here; the message names files and flags."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model or a dataset.

    Attributes:
      name: a name on the hub, or any other that is read.
      path: a local copy that is read instead, or None.
      flag: that names the copy, with what it wants.
    """

    name: str
    path: str | None
    flag: str

    @property
    def place(self) -> str:
        """What to read.

        Raises:
          SourceError: there is nothing at the path, or neither a path nor a name.
        """
        if self.path is not None:
            if not self.path.startswith(("pip:", "hf:", "tfds:")) and not _there(self.path):
                raise SourceError(f"{self.flag}: there is nothing at {self.path!r}")
            return self.path
        if not self.name:
            raise SourceError(f"{self.flag} has to say what is read. Got: nothing")
        return self.name


def policy_source(config: ConfigDict) -> Source:
    """The frozen model."""
    return Source(config.policy.name, config.policy.path, "--config.policy.path=FOLDER")


def value_source(config: ConfigDict) -> Source | None:
    """The value functions' backbone; None where it is the policy.

    A backbone of the reward's name is the reward model, wherever that is.
    """
    name, path = config.value.backbone, config.value.backbone_path
    policy = policy_source(config)
    if path is None and name in ("policy", policy.name, policy.path):
        return None
    reward = reward_source(config.task.get("reward"), "reward")
    if path is None and reward is not None and name == reward.name:
        return reward
    return Source(name, path, "--config.value.backbone_path=FOLDER")


def reward_source(spec: ConfigDict | None, field: str) -> Source | None:
    """The model of `task.reward` or `task.judge`; None where it is none, or the run trains it.

    Args:
      spec: the section.
      field: its name.
    """
    # Tasks of other kinds have sections of these names too.
    if spec is None or spec.get("kind") not in ("model", "pairs"):
        return None
    flag = f"--config.task.{field}.path=FOLDER"
    if spec.kind == "model" or spec.path is not None:
        return Source(spec.target or "", spec.get("path"), flag)
    return None


def dataset_source(fields: ConfigDict, field: str) -> Source:
    """Prompts or pairs.

    Args:
      fields: a section such as `task.train`.
      field: its name in the configuration, such as `task.train`.
    """
    return Source(fields.source, fields.get("path"), f"--config.{field}.path=FILE")


def evaluation_sets(task: ConfigDict) -> dict[str, ConfigDict]:
    """The sections of evaluation prompts by name; one without a name is called ''."""
    if "source" in task.evaluation:
        return {"": task.evaluation}
    return dict(task.evaluation.items())


def check_sources(config: ConfigDict) -> None:
    """Looks for every model and dataset that the run will read.

    Raises:
      SourceError: some are not here; one line with the files and the flags of all of them.
    """
    _check(_models(config), _datasets(config.task))


def check_reward_sources(config: ConfigDict) -> None:
    """Likewise for what a reward model is trained from.

    Raises:
      SourceError: the backbone or the pairs are not here.
    """
    backbone, pairs = value_source(config), config.task.reward.pairs
    models = () if backbone is None else (backbone,)
    _check(models, [(dataset_source(pairs, "task.reward.pairs"), pairs)])


def _check(models: Iterable[Source], datasets: Iterable[tuple[Source, ConfigDict]]) -> None:
    missing = []
    for source in models:
        try:
            open_checkpoint(source.place)
        except SourceError as error:
            missing.append(str(error))
        except HubError as error:
            missing.append(f"{error}: {source.flag}")
    for source, fields in datasets:
        try:
            next(rows(source.place, fields.get("split", "train")), None)
        except SourceError as error:
            missing.append(str(error))
        except MissingSourceError as error:
            missing.append(f"{error}; a local copy: {source.flag}")
    if missing:
        raise SourceError(" | ".join(missing))


def _models(config: ConfigDict) -> Iterator[Source]:
    found = [policy_source(config)]
    trained = trains_reward(config)
    backbone = value_source(config)
    # A reward model that was trained elsewhere is what value functions start from.
    if backbone is not None and (trained or config.task.get("reward", {}).get("kind") != "pairs"):
        found.append(backbone)
    for field in ("reward", "judge"):
        model = reward_source(config.task.get(field), field)
        if model is not None:
            found.append(model)
    if set(config.eval.rivals) & set(LOG_RATIO_RIVALS):
        for field in ("tuned", "untuned"):
            name = config.eval[field]
            if name is not None:
                found.append(Source(name, None, f"--config.eval.{field}=FOLDER"))
    yield from dict.fromkeys(found)


def trains_reward(config: ConfigDict) -> bool:
    """Whether the run trains its reward model from pairs."""
    reward = config.task.get("reward")
    return reward is not None and reward.get("kind") == "pairs" and reward.path is None


def _datasets(task: ConfigDict) -> Iterator[tuple[Source, ConfigDict]]:
    if task.name != "prompts":
        return
    sections = {"task.train": task.train}
    for name, fields in evaluation_sets(task).items():
        sections[f"task.evaluation.{name}" if name else "task.evaluation"] = fields
    if task.reward.kind == "pairs" and task.reward.path is None:
        sections["task.reward.pairs"] = task.reward.pairs
    for field, fields in sections.items():
        yield dataset_source(fields, field), fields


def _there(path: str) -> bool:
    return Path(path).expanduser().exists()
