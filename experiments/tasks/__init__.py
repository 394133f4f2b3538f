"""What a run is about: prompts, a reward, a second reward, and where value functions start.

A task is built from a configuration and a policy. What it trains for itself, such as a reward
model, lies in the run's folder and is a stage of the run like any other.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.devices import Devices
from iro_jax.data import Prompt
from iro_jax.evaluation import Ledger, Reader
from iro_jax.models import Pretrained, TextFormat
from iro_jax.rewards import Reward
from iro_jax.values import AnswerTokens, Head, StateCache, ValueFunction
from iro_jax.workdir import Workdir

TASKS = ("constraints", "prompts", "reviews")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, ready to be run.

    Attributes:
      name: for model cards and reports.
      train: prompts for the iterations' rollouts.
      evaluation: prompts that no training sees.
      reward: of whole answers, for training.
      judge: a second reward that training never sees, or None.
      start: the value function from which V_0 starts.
      prefix_reward: the reward as a value function, if it is one, to search with it directly.
      text_format: how prompts are rendered, everywhere in the run.
      tokens: answers as value functions read them.
      states: of the value functions' backbone, if it is frozen.
      reward_reader: what the reward reads with, for the cost ledger, if that is a network.
      sets: ids of evaluation prompts by the name of their set, where there are several.
    """

    name: str
    train: Sequence[Prompt]
    evaluation: Sequence[Prompt]
    reward: Reward
    judge: Reward | None
    start: ValueFunction
    text_format: TextFormat
    tokens: AnswerTokens
    states: StateCache | None
    prefix_reward: ValueFunction | None = None
    reward_reader: Reader | None = None
    sets: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def value_head(value: ConfigDict) -> Head | None:
    """The head that `config.value.head` describes, or None."""
    if value.head is None:
        return None
    fields = value.head.to_dict()
    return Head(**fields | {"hidden": tuple(fields["hidden"]), "support": tuple(fields["support"])})


@dataclasses.dataclass(frozen=True)
class Context:
    """What a task is built with."""

    config: ConfigDict
    policy: Pretrained
    policy_name: str
    workdir: Workdir
    ledger: Ledger
    progress: bool
    devices: Devices = Devices()

    def path(self, name: str) -> Path:
        return self.workdir / name

    def text_format(self, *models: Pretrained | None) -> TextFormat:
        """The configured one, with room for an answer in the contexts of the policy and of what
        else reads both.

        Raises:
          ValueError: there is none.
        """
        chosen = self.config.search
        readers = [self.policy, *(model for model in models if model is not None)]
        contexts = [model.network.config.context_length for model in readers]
        return TextFormat(**chosen.text_format).beside(chosen.max_new_tokens, contexts)


def build_task(context: Context) -> Task:
    """Builds the task that `config.task.name` names.

    Raises:
      ValueError: there is none of that name.
    """
    name: Any = context.config.task.name
    if name not in TASKS:
        raise ValueError(f"task.name must be one of {TASKS}. Got: {name!r}")
    module = importlib.import_module(f"experiments.tasks.{name}")
    return module.build(context)
