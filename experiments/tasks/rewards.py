"""Rewards by name, for configurations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from experiments.sources import reward_source
from iro_jax.models import Pretrained, TextFormat, from_pretrained
from iro_jax.rewards import (
    CallableReward,
    ConstraintReward,
    EndpointReward,
    ExactMatch,
    ModelReward,
    Reward,
    VaderReward,
    boxed_answer,
    gsm8k_answer,
    last_number,
    worked_answer,
)

KINDS = (
    "model",
    "pairs",
    "vader",
    "boxed",
    "gsm8k",
    "number",
    "constraints",
    "endpoint",
    "python",
)


def load_reward_model(
    spec: ConfigDict,
    field: str = "reward",
    load: Callable[[str], Pretrained] = from_pretrained,
) -> Pretrained | None:
    """The network of a reward of the kind `model`; None for the others.

    Args:
      spec: `kind`, one of `KINDS`, and its `target`: a reward model's name for `model`, a URL for
        `endpoint`, `module:function` for `python`; nothing for the others. A `path`, if there is
        one, is a local copy of the model.
      field: the name of the section.
      load: opens a model.

    Raises:
      ValueError: an unknown kind, or a target that is missing or not needed.
    """
    kind, target = spec.kind, spec.target
    if kind not in KINDS:
        raise ValueError(f"A reward's kind must be one of {KINDS}. Got: {kind!r}")
    if (target is not None) != (kind in ("model", "endpoint", "python")):
        raise ValueError(
            f"The rewards 'model', 'endpoint', 'python' need a target. Got: {target!r}"
        )
    source = reward_source(spec, field)
    return None if source is None else load(source.place)


def build_reward(
    spec: ConfigDict,
    model: Pretrained | None,
    policy_tokenizer: PreTrainedTokenizerBase,
    text_format: TextFormat,
) -> Reward:
    """The reward that a configuration describes.

    Args:
      spec: as for `load_reward_model`, and `model`, what that has loaded.
      policy_tokenizer: a reward model with the same one reads the sampled tokens themselves.
      text_format: how prompts are rendered.

    Raises:
      ValueError: a Python function that is not to be found.
    """
    kind, target = spec.kind, spec.target
    if model is not None:
        return ModelReward.of(model, policy_tokenizer=policy_tokenizer, text_format=text_format)
    if kind == "endpoint":
        return EndpointReward(target)
    if kind == "python":
        return CallableReward(_function(target))
    simple: dict[str, Any] = {
        "vader": VaderReward,
        # References may be worked solutions, boxed or not.
        "boxed": lambda: ExactMatch(boxed_answer, extract_reference=worked_answer),
        "gsm8k": lambda: ExactMatch(gsm8k_answer),
        "number": lambda: ExactMatch(last_number, extract_reference=worked_answer),
        "constraints": ConstraintReward,
    }
    return simple[kind]()


def _function(target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"A Python reward is named 'module:function' ({error}). Got: {target!r}"
        ) from error
