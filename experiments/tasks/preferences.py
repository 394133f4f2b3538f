"""A reward model from pairs of answers, as a stage of a run: pairs in, a folder out.

    config.task.reward = pairs_fields("pairs.jsonl")

`trainable="head"` fits a linear head on the frozen backbone of the value functions, by logistic
regression on differences of hidden states, which is the loss of Bradley and Terry; a machine with
nothing takes seconds for it. `trainable="all"` trains all weights of that backbone, as the paper
does. Value functions start from what comes out.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from iro_jax import baselines, hosts
from iro_jax.baselines import Pair
from iro_jax.data import Prompt, PromptError
from iro_jax.data.sources import rows, shorten
from iro_jax.evaluation import wins
from iro_jax.models import Pretrained
from iro_jax.models.sharding import RULES, Rules
from iro_jax.rewards import TextAnswer
from iro_jax.values import (
    AnswerTokens,
    FitSettings,
    Head,
    HeadParams,
    StateCache,
    ValueFunction,
    new_head,
    save_value,
)
from iro_jax.values import from_pretrained as load_value
from iro_jax.values.prefixes import group_by_prompt

_ROWS_AT_A_TIME = 32


def read_pairs(
    source: str,
    *,
    split: str = "train",
    prompt_field: str = "prompt",
    chosen_field: str = "chosen",
    rejected_field: str = "rejected",
    preferred_field: str | None = None,
    preferred_values: Sequence[str] = ("chosen", "rejected"),
    chat: bool = True,
) -> list[Pair]:
    """Pairs in the order of the source, which is any that `read_prompts` knows.

    Args:
      prompt_field: holds the prompt, text or messages.
      chosen_field, rejected_field: hold the answers: text, or messages that end in one.
      preferred_field: says which answer is better, by the first of `preferred_values` for that of
        `chosen_field` and the second for the other; rows with any other value are left out.
      chat: text is what a user says to the chat template, not a raw prompt.

    Raises:
      PromptError: the source does not exist, or a row is broken; names the place.
    """
    found = []
    fields = [prompt_field, chosen_field, rejected_field]
    fields += [preferred_field] if preferred_field else []
    for place, row in rows(source, split, fields):
        better, worse = chosen_field, rejected_field
        if preferred_field is not None:
            if row.get(preferred_field) not in preferred_values:
                continue
            if row[preferred_field] == preferred_values[1]:
                better, worse = worse, better
        try:
            answers = [_text(row, field) for field in (better, worse)]
            conversation = row[prompt_field]
            if chat and isinstance(conversation, str):
                conversation = ({"role": "user", "content": conversation},)
            prompt = Prompt(place, conversation)
        except (KeyError, ValueError) as error:
            raise PromptError(f"{place}: expected a prompt and two answers. Got: {error}") from None
        if answers[0] != answers[1]:
            found.append(Pair(prompt, TextAnswer(answers[0]), TextAnswer(answers[1])))
    return found


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row[field]
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise ValueError(f"{field}: {shorten(row[field])}")
    return value


def fitting_pairs(
    spec: ConfigDict, place: str, tokens: AnswerTokens
) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and held-out ones: those that fit into `spec.max_tokens`.

    Raises:
      PromptError: fewer than two fit.
    """
    fields = spec.pairs.to_dict()
    limit = fields.pop("limit")
    for other in ("source", "path"):
        fields.pop(other)
    chosen: list[Pair] = []
    for pair in read_pairs(place, **fields):
        readings = [tokens(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        if max(len(prompt) + len(answer) for prompt, answer in readings) <= spec.max_tokens:
            chosen.append(pair)
        if len(chosen) == limit:
            break
    if len(chosen) < 2:
        raise PromptError(
            f"{place}: expected at least two pairs of up to {spec.max_tokens} tokens."
            f" Got: {len(chosen)}"
        )
    held_out = max(1, round(spec.held_out * len(chosen)))
    return chosen[held_out:], chosen[:held_out]


def train_reward(
    spec: ConfigDict,
    place: str,
    model: Pretrained,
    folder: Path,
    *,
    name: str,
    layer: int | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains a reward model and writes it to `folder/export`.

    Args:
      spec: as `pairs_fields` has it.
      place: of the pairs.
      model: the backbone; in f32, if all of it is trained.
      name: that loads the backbone again.
      layer: that a head reads; None for the states after the final norm.
      mesh: over the devices of all hosts, which share the work where all weights are trained.

    Returns:
      How many pairs there were, and the share of the held-out ones in the right order.

    Raises:
      ValueError: there is no such `spec.trainable`.
      PromptError: pairs cannot be read.
      FitError: a loss is not finite, or the disk is full.
    """
    if spec.trainable not in ("head", "all"):
        raise ValueError(f"trainable must be 'head' or 'all'. Got: {spec.trainable!r}")
    assert model.tokenizer is not None
    tokens = AnswerTokens(model.tokenizer, model)
    train, held_out = fitting_pairs(spec, place, tokens)
    if spec.trainable == "head":
        states = StateCache(model, layer)
        params = _fit_head(_last_states(states, tokens, train), spec.regularisation)
        function = new_head(model, Head(), layer=layer, source=name)
        function = function.with_params(dataclasses.replace(function.params, head=params))
        accuracy = _accuracy(params, _last_states(states, tokens, held_out))
    else:
        untrained = new_head(model, Head(bias=False))
        # From zero, so that the first reward of every text is the same.
        zero = jax.tree.map(jnp.zeros_like, untrained.params.head)
        tuned = baselines.tune_reward(
            untrained.with_params(dataclasses.replace(untrained.params, head=zero)),
            train,
            held_out,
            tokens,
            FitSettings(**spec.fit, seed=seed),
            remat=spec.remat,
            folder=folder / "checkpoints",
            mesh=mesh,
            progress=progress,
        )
        function, accuracy = tuned.function, tuned.accuracy
    card = (
        f"# Reward model\n\nFrom {len(train)} pairs of {place}, on {name}"
        f" ({spec.trainable} trained). {accuracy:.3f} of {len(held_out)} other pairs are told"
        " right.\n"
    )
    if hosts.first():
        shutil.rmtree(folder / "export", ignore_errors=True)
        save_value(function, folder / "export", card=card)
    return {"pairs": len(train), "held_out": len(held_out), "pair_accuracy": accuracy}


def open_reward(
    folder: Path, model: Pretrained | None, mesh: Mesh | None = None, rules: Rules = RULES
) -> ValueFunction:
    """What `train_reward` has written.

    Args:
      model: the backbone that a head shares, if it is loaded.
      mesh, rules: where other weights are put; see `iro_jax.models.from_pretrained`.
    """
    return load_value(folder / "export", backbone=model, mesh=mesh, rules=rules)


def _last_states(
    states: StateCache, tokens: AnswerTokens, pairs: Sequence[Pair]
) -> Float[np.ndarray, "n 2 D"]:
    """Hidden states at the last tokens of the better and the worse answers."""
    found: list[np.ndarray] = []
    # A few at a time: hidden states of all tokens of all pairs would not fit.
    for start in range(0, len(pairs), _ROWS_AT_A_TIME):
        some = pairs[start : start + _ROWS_AT_A_TIME]
        readings = [tokens(p.prompt, answer) for p in some for answer in (p.chosen, p.rejected)]
        groups = states(group_by_prompt(readings), keep=False)
        found += [of_answer[-1] for group in groups for of_answer in group]
    return np.stack(found).reshape(len(pairs), 2, -1)


def _fit_head(states: Float[np.ndarray, "n 2 D"], regularisation: float) -> HeadParams:
    """A linear head whose rewards average zero; the differences decide its direction."""
    from sklearn.linear_model import LogisticRegression  # takes a second

    flat = states.reshape(-1, states.shape[-1])
    std = flat.std(axis=0) + 1e-6
    differences = (states[:, 0] - states[:, 1]) / std
    model = LogisticRegression(C=1 / regularisation, fit_intercept=False, max_iter=2000)
    # Each pair in both orders: logistic regression wants two classes.
    model.fit(np.concatenate([differences, -differences]), np.repeat([1, 0], len(differences)))
    kernel = model.coef_[0] / std
    params = {
        "kernel": jnp.asarray(kernel[None, :, None], jnp.float32),
        "bias": jnp.asarray([[-flat.mean(axis=0) @ kernel]], jnp.float32),
    }
    return (params,)


def _accuracy(params: HeadParams, states: Float[np.ndarray, "n 2 D"]) -> float:
    rewards = np.asarray(Head().logits(params, jnp.asarray(states)))[..., 0]
    return float(wins(rewards[:, 0], rewards[:, 1]).mean())
