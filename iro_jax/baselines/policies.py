"""Policies whose weights are trained: log-probabilities of answers, objectives, one fit.

Everything runs on the value functions' trainer (`iro_jax.values.fit`). A policy goes in and a
policy comes out; LoRA adapters are merged into its weights at the end of a fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from iro_jax.baselines.losses import dpo_loss, grpo_loss, irepo_loss
from iro_jax.models import Network, Params, Pretrained, bucket_length
from iro_jax.models.lora import Adapters, Target, init_adapters, merge_into
from iro_jax.models.sharding import where
from iro_jax.values.fit import Batch, Epoch, Example, FitSettings, Objective, fit

Reading: TypeAlias = tuple[Int[np.ndarray, " S"], Int[np.ndarray, " N"]]
"""A prompt's tokens and an answer's."""

_ROWS = 16


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """How a policy's weights are trained.

    Attributes:
      trainable: LoRA `adapters`, or `all` weights.
      rank, targets: of the adapters.
      remat: compute layers again for the gradient.
      fit: the optimiser's settings; a batch counts pairs, or answers where there are none.
      seed: of the adapters.
    """

    trainable: Literal["adapters", "all"] = "adapters"
    rank: int = 8
    targets: tuple[Target, ...] = get_args(Target)
    remat: bool = False
    fit: FitSettings = FitSettings(
        learning_rate=1e-4, batch_size=16, num_epochs=1, weight_decay=0.0, patience=None
    )
    seed: int = 0

    def __post_init__(self):
        if self.trainable not in ("adapters", "all"):
            raise ValueError(f"trainable must be 'adapters' or 'all'. Got: {self.trainable!r}")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A trained policy, and the losses of its fit."""

    policy: Pretrained
    curve: tuple[Epoch, ...]


def token_log_probs(
    network: Network,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    *,
    adapters: Adapters | None = None,
    remat: bool = False,
) -> Float[Array, "batch length"]:
    """log pi of every token given those before it, at temperature 1; 0 at the first and at padding.

    Args:
      tokens: texts from the first place on, padded behind their ends.
      mask: which tokens are real.
    """
    outputs = network.forward(
        params, tokens, mask, want=("hidden",), adapters=adapters, remat=remat
    )
    assert outputs.hidden is not None

    @jax.checkpoint
    def of_place(hidden_and_token):
        # Logits are held for one place at a time, and computed again for the gradient.
        hidden, token = hidden_and_token
        logits = network.logits(params, hidden)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    before = jnp.moveaxis(outputs.hidden[:, :-1], 1, 0)
    found = jnp.moveaxis(lax.map(of_place, (before, tokens[:, 1:].T)), 0, 1)
    return jnp.where(mask, jnp.pad(found, ((0, 0), (1, 0))), 0.0)


@dataclasses.dataclass(frozen=True)
class _PolicyObjective:
    """What objectives share: the log-probabilities of answers under the trainable policy."""

    network: Network
    remat: bool = False

    def log_probs(
        self, trainable: Any, frozen: Params | None, batch: Batch
    ) -> Float[Array, "rows length"]:
        """Of the tokens, zero where they are not the answer's; rows are answers one by one."""
        length = batch["tokens"].shape[-1]
        tokens, mask, answer = (
            batch[name].reshape(-1, length) for name in ("tokens", "mask", "answer")
        )
        params = trainable.get("params", frozen)
        found = token_log_probs(
            self.network,
            params,
            tokens,
            mask,
            adapters=trainable.get("adapters"),
            remat=self.remat,
        )
        return jnp.where(answer, found, 0.0)


@dataclasses.dataclass(frozen=True)
class PairObjective(_PolicyObjective):
    """Pairs of answers, `[n, 2, length]`: the better one first for `dpo`.

    Attributes:
      loss: `dpo`, or `irepo` with a `preference` for the first, `[n]`.
      beta: of the loss.
    """

    loss: Literal["dpo", "irepo"] = "dpo"
    beta: float = 0.1

    def __call__(self, trainable: Any, frozen: Params | None, batch: Batch) -> Float[Array, ""]:
        sums = self.log_probs(trainable, frozen, batch).sum(axis=-1).reshape(-1, 2)
        (first, second), (of_first, of_second) = sums.T, batch["reference"].T
        weight = batch["weight"]
        if self.loss == "dpo":
            return dpo_loss(first, second, of_first, of_second, self.beta, weight)
        return irepo_loss(
            first, second, of_first, of_second, batch["preference"], self.beta, weight
        )


@dataclasses.dataclass(frozen=True)
class GroupObjective(_PolicyObjective):
    """Answers with advantages, `[n, length]` and `[n]`: the loss of GRPO."""

    clip: float = 0.2
    beta: float = 0.04

    def __call__(self, trainable: Any, frozen: Params | None, batch: Batch) -> Float[Array, ""]:
        return grpo_loss(
            self.log_probs(trainable, frozen, batch),
            batch["sampled"],
            batch["reference"],
            batch["advantage"],
            batch["answer"],
            self.clip,
            self.beta,
            batch["weight"],
        )


def tune(
    policy: Pretrained,
    objective: Objective,
    train: Sequence[Example],
    held_out: Sequence[Example],
    settings: TuningSettings,
    *,
    folder: Path,
    progress: bool = False,
    desc: str = "Tuning",
) -> Tuned:
    """Fits a policy's weights to an objective.

    Args:
      policy: where its weights come from; stays as it is.
      objective: of this module.
      train, held_out: its examples.
      folder: of the checkpoints; a fit that was killed goes on from there.

    Raises:
      FitError: a loss is not finite, or the disk is full.
    """
    if settings.trainable == "all":
        trainable: dict[str, Any] = {"params": policy.params}
        frozen = None
    else:
        adapters = init_adapters(
            policy.network.config,
            jax.random.key(settings.seed),
            copies=1,
            rank=settings.rank,
            targets=settings.targets,
        )
        trainable, frozen = {"adapters": adapters}, policy.params
    found = fit(
        objective,
        trainable,
        frozen,
        train,
        held_out,
        settings.fit,
        folder=folder,
        progress=progress,
        desc=desc,
    )
    if settings.trainable == "all":
        params = jax.tree.map(
            lambda new, old: new.astype(old.dtype), found.params["params"], policy.params
        )
    else:
        params = merge_into(policy.params, found.params["adapters"])
    return Tuned(dataclasses.replace(policy, params=params), found.curve)


def answer_arrays(reading: Reading, length: int) -> dict[str, np.ndarray]:
    """One answer behind its prompt: `tokens`, `mask`, and which of them are the `answer`."""
    prompt, answer = reading
    size = len(prompt) + len(answer)
    if size > length:
        raise ValueError(f"A text must have at most {length} tokens. Got: {size}")
    tokens = np.zeros(length, np.int32)
    tokens[:size] = np.concatenate([prompt, answer])
    places = np.arange(length)
    return {
        "tokens": tokens,
        "mask": places < size,
        "answer": (places >= len(prompt)) & (places < size),
    }


def common_length(readings: Sequence[Reading]) -> int:
    """A bucket that holds all of them."""
    return bucket_length(max(len(prompt) + len(answer) for prompt, answer in readings))


def answer_log_probs(
    policy: Pretrained, readings: Sequence[Reading], *, length: int
) -> Float[np.ndarray, "n length"]:
    """log pi of the answers' tokens, zero elsewhere."""
    rows = [answer_arrays(reading, length) for reading in readings]
    filler = rows[:1] * (-len(rows) % _ROWS)
    found = []
    for start in range(0, len(rows) + len(filler), _ROWS):
        some = (rows + filler)[start : start + _ROWS]
        batch = {name: np.stack([row[name] for row in some]) for name in some[0]}
        found.append(_masked_log_probs(policy.network, policy.params, batch))
    return np.concatenate(found)[: len(rows)]


def _masked_log_probs(network: Network, params: Params, batch: Example) -> np.ndarray:
    with where(params):
        log_probs = _compiled_log_probs(network, params, batch["tokens"], batch["mask"])
    return np.where(batch["answer"], np.asarray(log_probs), 0.0)


_compiled_log_probs = jax.jit(token_log_probs, static_argnums=0)
