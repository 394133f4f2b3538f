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

from ml_collections import ConfigDict

from experiments.tasks import Context, Task, value_head
from experiments.tasks.rewards import build_reward
from iro_jax.collect import function_reader
from iro_jax.data import Prompt, read_prompts
from iro_jax.models import TextFormat, from_pretrained
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
    train = read_prompts(**task.train)
    evaluation = read_prompts(**task.evaluation)
    text_format = TextFormat(**context.config.search.text_format)
    tokenizer = context.policy.tokenizer
    assert tokenizer is not None
    judge: Reward | None = None
    if task.judge is not None:
        judge = build_reward(task.judge, tokenizer, text_format)
    reward = build_reward(task.reward, tokenizer, text_format)
    return assemble("prompts", context, train, evaluation, reward, judge)


def assemble(
    name: str,
    context: Context,
    train: list[Prompt],
    evaluation: list[Prompt],
    reward: Reward,
    judge: Reward | None,
) -> Task:
    """A task whose value functions start as `config.value` says."""
    start = start_function(context)
    assert context.policy.tokenizer is not None
    text_format = TextFormat(**context.config.search.text_format)
    frozen = context.config.value.trainable == "head"
    return Task(
        name=name,
        train=train,
        evaluation=evaluation,
        reward=reward,
        judge=judge,
        start=start,
        tokens=AnswerTokens(start.tokenizer, context.policy.tokenizer, text_format=text_format),
        states=StateCache(start.model, start.network.layer) if frozen else None,
        reward_reader=function_reader(start) if start.network.head is None else None,
    )


def start_function(context: Context) -> ValueFunction:
    """What V_0 starts from."""
    chosen = context.config.value
    policy = chosen.backbone in ("policy", context.policy_name)
    model = context.policy if policy else from_pretrained(chosen.backbone)
    source = context.policy_name if policy else chosen.backbone
    if model.network.config.head == "score":
        return ValueFunction(model, ValueNetwork(model.network), ValueParams(model.params), source)
    head = value_head(chosen)
    if head is None:
        raise ValueError(
            "value.head must describe a head, since value.backbone is a language model."
            f" Got: None, on {chosen.backbone!r}"
        )
    return new_head(model, head, layer=chosen.layer, seed=context.config.seed, source=source)
