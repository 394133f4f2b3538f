"""Your own prompts, from a file or a dataset, and any reward.

    config.task = {
        "name": "prompts",
        "train": {"source": "prompts.jsonl", ...},       see `iro_jax.data.read_prompts`
        "evaluation": {"source": "more.jsonl", ...},
        "reward": {"kind": "model", "target": "a-reward-model"},
        "judge": {"kind": ..., "target": ...} or None,
    }

Value functions start from `config.value.backbone`: `policy` and any other language model give a
fresh head on it; a reward model is taken as it is, head included.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.tasks import Context, Task, value_head
from experiments.tasks.rewards import build_reward, load_reward_model
from iro_jax.data import read_prompts
from iro_jax.evaluation import Reader
from iro_jax.models import Pretrained, TextFormat, from_pretrained
from iro_jax.rewards import Reward
from iro_jax.values import (
    AnswerTokens,
    StateCache,
    ValueFunction,
    ValueNetwork,
    ValueParams,
    new_head,
)


def source_fields(source: str | None = None) -> ConfigDict:
    """The fields of `config.task.train` and `config.task.evaluation`."""
    fields = ConfigDict(
        {
            "source": "",
            "prompt_field": "prompt",
            "id_field": None,
            "reference_field": None,
            "split": "train",
            "limit": None,
        },
        type_safe=False,
    )
    fields.source = source or ""
    return fields


def build(context: Context) -> Task:
    """The task of `config.task`."""
    task = context.config.task
    if context.config.eval.split != "test":
        raise ValueError(
            "task.evaluation says what is evaluated; eval.split has to stay 'test'."
            f" Got: {context.config.eval.split!r}"
        )
    train = read_prompts(**task.train)
    evaluation = read_prompts(**task.evaluation)
    start = start_function(context)
    reward_model = load_reward_model(task.reward)
    text_format = context.text_format(start.model, reward_model)
    tokenizer = context.policy.tokenizer
    assert tokenizer is not None
    judge: Reward | None = None
    if task.judge is not None:
        model = load_reward_model(task.judge)
        judge = build_reward(task.judge, model, tokenizer, context.text_format(model))
    return Task(
        name="prompts",
        train=train,
        evaluation=evaluation,
        reward=build_reward(task.reward, reward_model, tokenizer, text_format),
        judge=judge,
        prefix_reward=None if reward_model is None else _as_value(reward_model, task.reward.target),
        reward_reader=None if reward_model is None else Reader(reward_model.network.config),
        **value_start(context, start, text_format),
    )


def value_start(context: Context, start: ValueFunction, text_format: TextFormat) -> dict[str, Any]:
    """The fields of a task that say where value functions start and what they read."""
    frozen = context.config.value.trainable == "head"
    return {
        "start": start,
        "text_format": text_format,
        "tokens": AnswerTokens(start.tokenizer, context.policy, text_format=text_format),
        "states": StateCache(start.model, start.network.layer) if frozen else None,
    }


def start_function(context: Context) -> ValueFunction:
    """What V_0 starts from."""
    chosen = context.config.value
    policy = chosen.backbone in ("policy", context.policy_name)
    model = context.policy if policy else from_pretrained(chosen.backbone)
    source = context.policy_name if policy else chosen.backbone
    if model.network.config.head == "score":
        return _as_value(model, source)
    head = value_head(chosen)
    if head is None:
        raise ValueError(
            "value.head must describe a head, since value.backbone is a language model."
            f" Got: None, on {chosen.backbone!r}"
        )
    return new_head(model, head, layer=chosen.layer, seed=context.config.seed, source=source)


def _as_value(model: Pretrained, source: str) -> ValueFunction:
    """A reward model, asked for every prefix."""
    return ValueFunction(model, ValueNetwork(model.network), ValueParams(model.params), source)
