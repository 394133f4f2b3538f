"""From pairs of answers to a policy (DPO) or a reward model (Bradley-Terry)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from iro_jax.baselines.losses import bradley_terry_loss
from iro_jax.baselines.policies import (
    PairObjective,
    Reading,
    Tuned,
    TuningSettings,
    answer_arrays,
    answer_log_probs,
    common_length,
    tune,
)
from iro_jax.data import Prompt
from iro_jax.models import Pretrained
from iro_jax.models.sharding import where
from iro_jax.rewards import Answer
from iro_jax.values import AnswerTokens, ValueFunction, ValueNetwork, ValueParams
from iro_jax.values.fit import Batch, Example, FitSettings, fit


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, the better one first.

    Attributes:
      margin: by which the better one leads, where that is known.
    """

    prompt: Prompt
    chosen: Answer
    rejected: Answer
    margin: float = 0.0


def tune_dpo(
    policy: Pretrained,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    tokens: AnswerTokens,
    settings: TuningSettings,
    *,
    beta: float = 0.1,
    folder: Path,
    progress: bool = False,
) -> Tuned:
    """Direct preference optimisation (arXiv 2305.18290); the reference is the policy itself.

    Args:
      pairs, held_out: to train on, and to measure on.
      tokens: answers as the policy reads them.
      folder: of the checkpoints.

    Raises:
      ValueError: there are no pairs.
      FitError: a loss is not finite, or the disk is full.
    """
    _check(pairs, held_out)
    length = common_length(
        [r for some in (pairs, held_out) for p in some for r in _read(p, tokens)]
    )

    def examples(some: Sequence[Pair]) -> list[Example]:
        readings = [reading for pair in some for reading in _read(pair, tokens)]
        reference = answer_log_probs(policy, readings, length=length).sum(axis=1).reshape(-1, 2)
        return [
            stacked(readings[2 * i : 2 * i + 2], length)
            | {"reference": reference[i].astype(np.float32), "weight": np.ones((), np.float32)}
            for i in range(len(some))
        ]

    objective = PairObjective(policy.network, settings.remat, "dpo", beta)
    return tune(
        policy,
        objective,
        examples(pairs),
        examples(held_out),
        settings,
        folder=folder,
        progress=progress,
        desc="DPO",
    )


def stacked(readings: Sequence[Reading], length: int) -> Example:
    """Several answers as one example, `[answers, length]`."""
    rows = [answer_arrays(reading, length) for reading in readings]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass(frozen=True)
class RewardObjective:
    """Bradley-Terry on pairs, `[n, 2, length]`; the reward is read at each answer's last token."""

    network: ValueNetwork
    remat: bool = False

    def __call__(self, trainable: ValueParams, frozen: None, batch: Batch) -> Float[Array, ""]:
        del frozen
        better, worse = self.rewards(trainable, batch).T
        return bradley_terry_loss(better, worse, batch["margin"], batch["weight"])

    def rewards(self, params: ValueParams, batch: Batch) -> Float[Array, "n 2"]:
        """Of both answers."""
        length = batch["tokens"].shape[-1]
        tokens, mask = (batch[name].reshape(-1, length) for name in ("tokens", "mask"))
        values = self.network.forward(params, tokens, mask, remat=self.remat)[..., 0]
        last = jnp.sum(mask, axis=-1, keepdims=True) - 1
        return jnp.take_along_axis(values, last, axis=-1).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class TunedReward:
    """A reward model, and the share of held-out pairs that it puts in the right order."""

    function: ValueFunction
    accuracy: float


def tune_reward(
    start: ValueFunction,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    tokens: AnswerTokens,
    settings: FitSettings,
    *,
    remat: bool = False,
    folder: Path,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> TunedReward:
    """A reward model from preference pairs: all weights, by the loss of Bradley and Terry.

    Args:
      start: a score network, or a head on a backbone.
      pairs, held_out: to train on, and to measure on.
      tokens: answers as the model reads them.
      folder: of the checkpoints.
      mesh: as in `iro_jax.values.fit.fit`.

    Raises:
      ValueError: there are no pairs.
      FitError: a loss is not finite, or the disk is full.
    """
    _check(pairs, held_out)
    length = common_length(
        [r for some in (pairs, held_out) for p in some for r in _read(p, tokens)]
    )

    def examples(some: Sequence[Pair]) -> list[Example]:
        return [
            stacked(_read(pair, tokens), length)
            | {"margin": np.asarray(pair.margin, np.float32), "weight": np.ones((), np.float32)}
            for pair in some
        ]

    objective = RewardObjective(start.network, remat)
    measured = examples(held_out)
    found = fit(
        objective,
        start.params,
        None,
        examples(pairs),
        measured,
        settings,
        folder=folder,
        mesh=mesh,
        progress=progress,
        desc="reward model",
    )
    params = jax.tree.map(lambda new, old: new.astype(old.dtype), found.params, start.params)
    rank = jax.jit(objective.rewards)
    right = []
    for start_row in range(0, len(measured), settings.batch_size):
        some = measured[start_row : start_row + settings.batch_size]
        batch = {name: np.stack([example[name] for example in some]) for name in some[0]}
        with where(params.backbone):
            better, worse = np.asarray(rank(params, batch)).T
        right += [*((better > worse) + 0.5 * (better == worse))]
    model = dataclasses.replace(start.model, params=params.backbone)
    function = dataclasses.replace(start, model=model, params=params, source=None)
    return TunedReward(function, float(np.mean(right)))


def _read(pair: Pair, tokens: AnswerTokens) -> list[Reading]:
    return [tokens(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]


def _check(pairs: Sequence[Pair], held_out: Sequence[Pair]) -> None:
    if not pairs or not held_out:
        raise ValueError(
            f"There must be pairs to train on and others. Got: {len(pairs)} and {len(held_out)}"
        )
