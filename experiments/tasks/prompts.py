"""Your own prompts, from a file or a dataset, and any reward.

    config.task = {
        "name": "prompts",
        "train": source_fields("prompts.jsonl"),          see `iro_jax.data.read_prompts`
        "evaluation": source_fields("more.jsonl"),        or several of them, by name
        "reward": reward_fields("model", "a-reward-model"),
        "judge": reward_fields(...) or None,
    }

Value functions start from `config.value.backbone`: `policy` and any other language model give a
fresh head on it; a reward model is taken as it is, head included. A reward model that the run
trains from pairs (`experiments/tasks/preferences.py`) is what they start from, whatever that is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from experiments.sources import (
    dataset_source,
    evaluation_sets,
    trains_reward,
    value_source,
)
from experiments.tasks import Context, Task, value_head
from experiments.tasks.preferences import open_reward, train_reward
from experiments.tasks.rewards import build_reward, load_reward_model
from iro_jax.collect import function_reader
from iro_jax.data import Prompt, read_prompts
from iro_jax.evaluation import Reader
from iro_jax.models import Pretrained, TextFormat
from iro_jax.rewards import Reward
from iro_jax.values import (
    AnswerTokens,
    FunctionReward,
    StateCache,
    ValueFunction,
    ValueNetwork,
    ValueParams,
    new_head,
)

Load = Callable[[str], Pretrained]
_REWARD = "reward"


def build(context: Context) -> Task:
    """The task of `config.task`."""
    task = context.config.task
    if context.config.eval.split != "test":
        raise ValueError(
            "task.evaluation says what is evaluated; eval.split has to stay 'test'."
            f" Got: {context.config.eval.split!r}"
        )
    # What reward and value functions both start from is loaded once.
    load = functools.cache(context.devices.load)
    train = _read(task.train, "task.train")
    sets = {
        name: _read(fields, f"task.evaluation.{name}" if name else "task.evaluation", name)
        for name, fields in evaluation_sets(task).items()
    }
    learned = _learned_reward(context, load) if trains_reward(context.config) else None
    reward_model = load_reward_model(task.reward, "reward", load)
    if learned is not None and learned.network.head is None:
        # A network with a score head of its own, as any other reward model.
        reward_model, learned = learned.model, None
    if learned is not None:
        start = learned
    elif reward_model is not None and task.reward.kind == "pairs":
        start = _as_value(reward_model, task.reward.path or str(reward_model.origin))
    else:
        start = start_function(context, load)
    text_format = context.text_format(start.model, reward_model)
    tokenizer = context.policy.tokenizer
    assert tokenizer is not None
    fields = value_start(context, start, text_format)
    if learned is not None:
        states = fields["states"] or StateCache(learned.model, learned.network.layer)
        reward: Reward = FunctionReward(learned, fields["tokens"], states)
        prefix_reward, reader = learned, function_reader(learned)
    else:
        reward = build_reward(task.reward, reward_model, tokenizer, text_format)
        prefix_reward, reader = None, None
        if reward_model is not None:
            prefix_reward = _as_value(reward_model, str(reward_model.origin))
            reader = Reader(reward_model.network.config)
    return Task(
        name="prompts",
        train=train,
        evaluation=[prompt for prompts in sets.values() for prompt in prompts],
        sets={name: [p.id for p in prompts] for name, prompts in sets.items() if name},
        reward=reward,
        judge=_judge(context, load),
        prefix_reward=prefix_reward,
        reward_reader=reader,
        **fields,
    )


def _read(fields: ConfigDict, field: str, name: str = "") -> list[Prompt]:
    """The prompts of a section; those of a set have its name before their ids."""
    chosen = fields.to_dict()
    chosen.pop("path", None)
    chosen["source"] = dataset_source(fields, field).place
    prompts = read_prompts(**chosen)
    if not name:
        return prompts
    return [dataclasses.replace(prompt, id=f"{name}/{prompt.id}") for prompt in prompts]


def _judge(context: Context, load: Load) -> Reward | None:
    spec = context.config.task.judge
    if spec is None or spec.kind is None:
        return None
    model = load_reward_model(spec, "judge", load)
    tokenizer = context.policy.tokenizer
    assert tokenizer is not None
    return build_reward(spec, model, tokenizer, context.text_format(model))


def _learned_reward(context: Context, load: Load) -> ValueFunction:
    """A stage of the run: the reward model is trained, exported, and read back."""
    config, folder = context.config, context.path(_REWARD)
    spec, source = config.task.reward, value_source(config)
    whole = spec.trainable == "all"
    name = context.policy_name if source is None else source.place
    shared = None if whole else context.policy if source is None else load(name)
    if not context.workdir.done(_REWARD):
        place = dataset_source(spec.pairs, "task.reward.pairs").place
        with context.ledger.measure(_REWARD, "fit", "training"):
            facts = train_reward(
                spec,
                place,
                shared or context.devices.load(name, "float32"),
                folder,
                name=name,
                layer=config.value.layer,
                seed=config.seed,
                mesh=context.devices.mesh,
                progress=context.progress,
            )
        context.workdir.finish(_REWARD, facts)
    devices = context.devices
    return open_reward(folder, shared, devices.own, devices.value_rules)


def value_start(context: Context, start: ValueFunction, text_format: TextFormat) -> dict[str, Any]:
    """The fields of a task that say where value functions start and what they read."""
    frozen = context.config.value.trainable == "head"
    return {
        "start": start,
        "text_format": text_format,
        "tokens": AnswerTokens(start.tokenizer, context.policy, text_format=text_format),
        "states": StateCache(start.model, start.network.layer) if frozen else None,
    }


def start_function(context: Context, load: Load | None = None) -> ValueFunction:
    """What V_0 starts from.

    Args:
      load: opens a model; by default where the run's networks lie.
    """
    load = load or context.devices.load
    chosen, found = context.config.value, value_source(context.config)
    model = context.policy if found is None else load(found.place)
    source = context.policy_name if found is None else found.place
    if model.network.config.head == "score":
        return _as_value(model, source)
    head = value_head(chosen)
    if head is None:
        raise ValueError(
            "value.head must describe a head, since value.backbone is a language model."
            f" Got: None, on {source!r}"
        )
    return new_head(model, head, layer=chosen.layer, seed=context.config.seed, source=source)


def _as_value(model: Pretrained, source: str) -> ValueFunction:
    """A reward model, asked for every prefix."""
    return ValueFunction(model, ValueNetwork(model.network), ValueParams(model.params), source)
