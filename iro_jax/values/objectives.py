"""What a fit of a value function minimises.

    Objective(loss, network, trainable)   trainable parameters and a batch -> mean loss
    state_examples                        rollouts of a frozen backbone: its hidden states
    token_examples                        rollouts as tokens, for everything else

A batch holds, for n rollouts of at most so many prefixes, either `states` `[n, length, D]`
(hidden states after the bare prompt and each token of the answer) or `tokens` and `mask`
`[n, length]`; which places are `prefixes` `[n, length]`; the final `reward` `[n]`; for
compression the `targets` `[n, length]`; for CD-Q the `next_states` `[n, length, k, D]` behind the
policy's k most probable next tokens and their `next_probabilities` `[n, length, k]`; and the
`weight` `[n]` of each rollout.

In a batch packed by `iro_jax.values.packing`, what networks read is without most of its padding:
`tokens`, `states` and `next_states` are rows of several rollouts each, `[rows, slots, ...]`, and
`first` `[n]` says where each one begins. Predictions are taken apart before the loss, which never
sees that they were together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from iro_jax.models import Params
from iro_jax.models.flops import forward_flops
from iro_jax.models.throughput import Work
from iro_jax.values import losses
from iro_jax.values.fit import Batch, PyTree, Stacked
from iro_jax.values.network import ValueNetwork, ValueParams
from iro_jax.values.next_states import NextTokens
from iro_jax.values.targets import gae_targets, td_lambda_targets

LossName: TypeAlias = Literal[
    "monte_carlo", "verifiable", "td_lambda", "gae", "categorical", "cdq", "compression"
]
Trainable: TypeAlias = Literal["head", "adapters", "all"]


@dataclasses.dataclass(frozen=True)
class ValueObjective:
    """A loss of a value function's predictions at every prefix.

    Attributes:
      network: T = 1.
      loss: `monte_carlo` (equation 7), `verifiable` (49), `td_lambda` (50), `gae`,
        `categorical`, `cdq`, or `compression` (10).
      trainable: the `head` alone, LoRA `adapters` with the head, or `all`.
      gamma, lam: of `td_lambda` and `gae`.
      remat: whether the layers are computed again for the gradient.
    """

    network: ValueNetwork
    loss: LossName = "monte_carlo"
    trainable: Trainable = "head"
    gamma: float = 1.0
    lam: float = 0.99
    remat: bool = False

    def __post_init__(self):
        if self.loss not in get_args(LossName):
            raise ValueError(f"loss must be one of {get_args(LossName)}. Got: {self.loss!r}")
        if self.trainable not in get_args(Trainable):
            raise ValueError(
                f"trainable must be one of {get_args(Trainable)}. Got: {self.trainable!r}"
            )
        output = "identity" if self.network.head is None else self.network.head.output
        needed = {"verifiable": "sigmoid", "categorical": "categorical"}.get(self.loss)
        if needed is not None and output != needed:
            raise ValueError(
                f"loss={self.loss!r} needs a head with output={needed!r}. Got: {output!r}"
            )
        if self.trainable == "adapters" and not self.network.adapters:
            raise ValueError("trainable='adapters' needs a network with adapters. Got: none")
        if self.loss == "cdq" and (self.trainable != "head" or output == "categorical"):
            raise ValueError(
                "loss='cdq' is for heads that give a value, on a frozen backbone."
                f" Got: trainable={self.trainable!r}, output={output!r}"
            )
        if self.trainable == "head" and self.network.head is None:
            raise ValueError(
                "trainable='head' needs a network with a head of its own. Got: a score head, which"
                " is part of its backbone"
            )

    def initial(self, params: ValueParams) -> PyTree:
        """The trainable part of a value function's parameters."""
        if self.trainable == "all":
            return {"backbone": params.backbone, "head": params.head, "adapters": params.adapters}
        if self.trainable == "adapters":
            return {"head": params.head, "adapters": params.adapters}
        return {"head": params.head}

    def combine(self, params: ValueParams, trainable: PyTree) -> ValueParams:
        """The value function's parameters with the trainable part replaced, in their types."""
        as_stored = jax.tree.map(
            lambda new, old: new.astype(old.dtype), trainable, self.initial(params)
        )
        return dataclasses.replace(params, **as_stored)

    def frozen(self, params: ValueParams) -> Params | None:
        """The part that is not trained."""
        return None if self.trainable == "all" else params.backbone

    def __call__(self, trainable: PyTree, frozen: Params | None, batch: Batch) -> Float[Array, ""]:
        raw = self._predict(trainable, frozen, batch)
        prefixes, weight = batch["prefixes"], batch["weight"]
        if self.loss == "compression":
            values = self._values(raw)
            return losses.compression_loss(values, batch["targets"], prefixes, weights=weight)
        reward = batch["reward"]
        if self.loss == "verifiable":
            return losses.verifiable_loss(raw, reward, prefixes, weights=weight)
        if self.loss == "categorical":
            assert self.network.head is not None
            support = self.network.head.support
            return losses.categorical_loss(raw, reward, prefixes, support, weights=weight)
        values = self._values(raw)
        if self.loss == "monte_carlo":
            return losses.monte_carlo_loss(values, reward, prefixes, weights=weight)
        if self.loss == "cdq":
            expected = self._expected_next(trainable, batch)
            return losses.cdq_loss(values, expected, reward, prefixes, weights=weight)
        make_targets = td_lambda_targets if self.loss == "td_lambda" else gae_targets
        targets = make_targets(values, reward, prefixes, self.gamma, self.lam)
        return losses.td_loss(values, targets, prefixes, weights=weight)

    def work(self, params: ValueParams, batch: Stacked) -> Work:
        """What the loss of a batch and its gradient take, in the products that `flops` counts.

        A gradient takes the products of a forward pass once more for what goes into them and once
        more for the weights, where these are trained.
        """
        places = np.asarray(batch["mask" if "mask" in batch else "prefixes"])
        lengths = np.asarray(batch.get("lengths", places.sum(axis=1)))
        tokens = int(lengths.sum())
        config, layers = self.network.network.config, self.network.layer
        layers = config.num_layers if layers is None else layers
        added = (params.head, params.adapters and params.adapters[:layers])
        flops = 3.0 * 2 * tokens * sum(x.size for x in jax.tree.leaves(added))
        if "states" not in batch:
            passes = {"head": 1, "adapters": 2, "all": 3}[self.trainable]
            flops += passes * forward_flops(config, lengths, layers=layers)
        return Work(tokens, places.size, flops)

    def _predict(self, trainable: PyTree, frozen: Params | None, batch: Batch) -> Array:
        """Values, or the logits behind them, at every place of the batch."""
        if "states" in batch:
            assert self.network.head is not None
            raw = self.network.head.logits(trainable["head"], batch["states"])
            return _of_rollouts(raw[:, :, 0], batch)
        params = ValueParams(**({"backbone": frozen} | trainable))
        raw = self.network.forward(
            params,
            batch["tokens"],
            batch["mask"],
            segments=batch.get("segments"),
            raw=True,
            remat=self.remat,
        )
        return _of_rollouts(raw[:, :, 0], batch)

    def _expected_next(self, trainable: PyTree, batch: Batch) -> Float[Array, "n length"]:
        """sum_z pi(z | s_h) V([s_h, z]), over the next tokens that were read."""
        assert self.network.head is not None
        values = self.network.head(trainable["head"], batch["next_states"])[..., 0]
        return _of_rollouts(jnp.sum(batch["next_probabilities"] * values, axis=-1), batch)

    def _values(self, raw: Array) -> Float[Array, "n length"]:
        head = self.network.head
        return raw if head is None else head.values(raw)


def _of_rollouts(x: Float[Array, "rows slots *atoms"], batch: Batch) -> Array:
    """What a network gave for a batch, `[n, length, *atoms]`; arbitrary at padding."""
    if "first" not in batch:
        return x
    places = batch["first"][:, None] + jnp.arange(batch["prefixes"].shape[1])
    return jnp.take(x.reshape(-1, *x.shape[2:]), places, axis=0, mode="clip")


def state_examples(
    states: Sequence[Float[np.ndarray, "N+1 D"]],
    rewards: Sequence[float],
    targets: Sequence[Float[np.ndarray, " N+1"]] | None = None,
    next_tokens: Sequence[NextTokens] | None = None,
    *,
    length: int,
) -> list[dict[str, np.ndarray]]:
    """Examples for a head on a frozen backbone.

    Args:
      states: hidden states behind every prefix of each rollout.
      rewards: of each rollout.
      targets: values at every prefix, for compression.
      next_tokens: what may come after every prefix, for CD-Q.
      length: places of an example.
    """
    examples = []
    for index, of_rollout in enumerate(states):
        count = len(of_rollout)
        example = _example(length, slice(0, count), rewards[index])
        example["states"] = _padded(of_rollout, length)
        if targets is not None:
            example["targets"] = _padded(targets[index], length)
        if next_tokens is not None:
            after, probabilities = next_tokens[index]
            example["next_states"] = _padded(after, length)
            example["next_probabilities"] = _padded(probabilities, length)
        examples.append(example)
    return examples


def token_examples(
    readings: Sequence[tuple[Int[np.ndarray, " S"], Int[np.ndarray, " N"]]],
    rewards: Sequence[float],
    targets: Sequence[Float[np.ndarray, " N+1"]] | None = None,
    *,
    length: int,
) -> list[dict[str, np.ndarray]]:
    """Examples for a backbone that is trained; `readings` are prompts and answers."""
    examples = []
    for index, (prompt, answer) in enumerate(readings):
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        first = len(prompt) - 1
        example = _example(length, slice(first, len(tokens)), rewards[index])
        example["tokens"] = _padded(tokens, length)
        example["mask"] = np.arange(length) < len(tokens)
        if targets is not None:
            example["targets"] = _padded(np.pad(targets[index], (first, 0)), length)
        examples.append(example)
    return examples


def _example(length: int, prefixes: slice, reward: float) -> dict[str, np.ndarray]:
    marked = np.zeros(length, bool)
    marked[prefixes] = True
    return {
        "prefixes": marked,
        "reward": np.asarray(reward, np.float32),
        "weight": np.ones((), np.float32),
    }


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    if len(x) > length:
        raise ValueError(f"A rollout must fit into {length} places. Got: {len(x)}")
    return np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)])
