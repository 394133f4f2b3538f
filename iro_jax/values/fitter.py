"""From rollouts to a value function: examples, a fit, and values of every prefix.

A head on a frozen backbone is fitted to hidden states that are computed once (`StateCache`);
everything else is fitted to tokens. `ValueFitter` does either, from what it is handed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias, get_args

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from iro_jax.data import Rollout, RolloutStore
from iro_jax.models import bucket_length
from iro_jax.models.lora import Target
from iro_jax.values.fit import Epoch, FitSettings, fit
from iro_jax.values.function import (
    AnswerTokens,
    ValueFunction,
    merge_adapters,
    with_adapters,
)
from iro_jax.values.heads import Head, fold_inputs
from iro_jax.values.network import ValueNetwork
from iro_jax.values.next_states import NextStates
from iro_jax.values.objectives import (
    LossName,
    Trainable,
    ValueObjective,
    state_examples,
    token_examples,
)
from iro_jax.values.packing import packing_for
from iro_jax.values.placement import Placement
from iro_jax.values.prefixes import StateCache, group_by_prompt, head_values, prefix_values

_Part: TypeAlias = tuple[Sequence[Rollout], Sequence[float], Sequence[np.ndarray] | None]
"""Rollouts, their rewards as the fit sees them, and for compression their targets."""


@dataclasses.dataclass(frozen=True)
class ValueSettings:
    """What a value function is and how it is fitted.

    Attributes:
      loss: see `ValueObjective`.
      trainable: the `head` on a frozen backbone, LoRA `adapters` with the head, or `all`.
      head: of the value functions; None keeps the head of what they start from.
      layer: what a new head reads; None for the states after the final norm.
      gamma, lam: of the losses `td_lambda` and `gae`.
      normalise: fit to standardised rewards and put the scale into the head afterwards.
      rank, targets: of LoRA adapters.
      dtype: of the backbone's computation while it is trained; weights stay in f32.
      remat: compute layers again for the gradient.
      fit: the optimiser's settings.
      compression: those of compression (10); None for the same.
      seed: of new heads and adapters.
    """

    loss: LossName = "monte_carlo"
    trainable: Trainable = "all"
    head: Head | None = None
    layer: int | None = None
    gamma: float = 1.0
    lam: float = 0.99
    normalise: bool = False
    rank: int = 8
    targets: tuple[Target, ...] = ("qkv", "output", "up", "down")
    dtype: str = "float32"
    remat: bool = False
    fit: FitSettings = FitSettings()
    compression: FitSettings | None = None
    seed: int = 0

    def __post_init__(self):
        for name, choices in (
            ("loss", get_args(LossName)),
            ("trainable", get_args(Trainable)),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}. Got: {getattr(self, name)!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1. Got: {self.rank}")

    def objective(self, network: ValueNetwork, loss: LossName) -> ValueObjective:
        """What a fit of this network minimises, in the type that it computes in.

        Args:
          loss: `self.loss`, or `compression` where a sum is fitted.

        Raises:
          ValueError: the loss and the network's head do not go together.
        """
        if self.trainable != "head":
            config = network.network.config.replace(dtype=self.dtype)
            backbone = dataclasses.replace(network.network, config=config)
            network = dataclasses.replace(network, network=backbone)
        return ValueObjective(
            network, loss, self.trainable, gamma=self.gamma, lam=self.lam, remat=self.remat
        )


@dataclasses.dataclass(frozen=True)
class FittedFunction:
    """A value function and how its fit went; see `Fitted`.

    Attributes:
      lengths: tokens of the training rollouts, each with its prompt.
      prefixes: of these rollouts at which it was trained.
      epochs: passes over them.
      next_tokens: read behind their prefixes, for CD-Q.
    """

    function: ValueFunction
    curve: tuple[Epoch, ...]
    best_epoch: int
    lengths: Int[np.ndarray, " n"]
    prefixes: int
    epochs: int
    next_tokens: int = 0


class ValueFitter:
    """Fits value functions to stored rollouts.

    Args:
      settings: of the functions and fits.
      tokens: rollouts as the value functions read them.
      states: of the frozen backbone, where only heads are trained.
      next_states: one token further, for the loss `cdq`.
      mesh: see `iro_jax.values.fit`.
      progress: whether to show bars.
    """

    def __init__(
        self,
        settings: ValueSettings,
        tokens: AnswerTokens,
        *,
        states: StateCache | None = None,
        next_states: NextStates | None = None,
        mesh: Mesh | None = None,
        progress: bool = False,
    ):
        self.settings = settings
        self.tokens = tokens
        self.states = states
        self.next_states = next_states
        self.mesh = mesh
        self.progress = progress

    def check(self, start: ValueFunction, *, compress: bool) -> None:
        """Looks for what would stop a fit, before there is anything to fit to.

        Raises:
          ValueError: the loss and the head do not go together.
        """
        function = self._prepare(start)
        self.settings.objective(function.network, self.settings.loss)
        if self.settings.loss == "cdq":
            self._next_states(function)
        if self.settings.normalise:
            _rescaled(function, 0.0, 2.0)
        if compress:
            self.settings.objective(self._for_sums(function).network, "compression")

    def __call__(
        self,
        start: ValueFunction,
        stores: Sequence[RolloutStore],
        train: Sequence[Rollout],
        held_out: Sequence[Rollout],
        *,
        folder: Path,
        desc: str = "value",
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> FittedFunction:
        """Fits a value function to the rewards of rollouts.

        Args:
          start: where the weights come from.
          stores: which hold the rollouts.
          train, held_out: some of their rollouts.
          folder: for checkpoints.
          on_epoch: is told every line of the curve.

        Raises:
          FitError: a loss is not finite.
        """
        rewards = np.asarray([rollout.reward for rollout in train], np.float64)
        mean, std = (rewards.mean(), rewards.std()) if self.settings.normalise else (0.0, 1.0)
        if std == 0:
            raise ValueError(
                f"Rewards that are to be standardised must differ. Got: {mean} for all"
                f" {len(rewards)} rollouts"
            )

        def scaled(rollouts: Sequence[Rollout]) -> list[float]:
            return [(rollout.reward - mean) / std for rollout in rollouts]

        function = _rescaled(self._prepare(start), -mean / std, 1 / std)
        parts: list[_Part] = [(train, scaled(train), None), (held_out, scaled(held_out), None)]
        settings, loss = self.settings.fit, self.settings.loss
        if loss == "cdq":
            # Its targets move with the head, so that its losses do not tell epochs apart.
            settings = dataclasses.replace(settings, patience=None)
        found = self._fit(function, loss, stores, parts, settings, folder, desc, on_epoch)
        return dataclasses.replace(found, function=_rescaled(found.function, mean, std))

    def compress(
        self,
        functions: Sequence[ValueFunction],
        betas: Sequence[float],
        stores: Sequence[RolloutStore],
        train: Sequence[Rollout],
        held_out: Sequence[Rollout],
        *,
        folder: Path,
        desc: str = "compressed",
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> FittedFunction:
        """Fits one value function to sum_t V_t / beta_t at every prefix (equation 10).

        It starts from the last one, with an output that can be any number.
        """

        def sums(rollouts: Sequence[Rollout]) -> list[np.ndarray]:
            values = [self.values(function, stores, rollouts) for function in functions]
            return [
                sum(value / beta for value, beta in zip(of_each, betas, strict=True))
                for of_each in zip(*values, strict=True)
            ]

        train_sums, held_out_sums = sums(train), sums(held_out)
        everywhere = np.concatenate(train_sums)
        mean, std = float(everywhere.mean()), float(everywhere.std()) or 1.0
        function = self._for_sums(self._prepare(functions[-1]))
        head = function.network.head
        if head is None:
            mean, std = 0.0, 1.0
        elif not head.bias:
            mean = 0.0

        def part(rollouts: Sequence[Rollout], targets: Sequence[np.ndarray]) -> _Part:
            return rollouts, [0.0] * len(rollouts), [(x - mean) / std for x in targets]

        parts = [part(train, train_sums), part(held_out, held_out_sums)]
        settings = self.settings.compression or self.settings.fit
        found = self._fit(function, "compression", stores, parts, settings, folder, desc, on_epoch)
        return dataclasses.replace(found, function=_rescaled(found.function, mean, std))

    def values(
        self,
        function: ValueFunction,
        stores: Sequence[RolloutStore],
        rollouts: Sequence[Rollout],
    ) -> list[Float[np.ndarray, " N+1"]]:
        """V after the bare prompt and after each token of every rollout."""
        if self._reads_states(function):
            states = self._states(stores, rollouts)
            return head_values(function, states)
        readings = [self.tokens(rollout.prompt, rollout) for rollout in rollouts]
        return prefix_values(function, readings)

    def _fit(
        self,
        function: ValueFunction,
        loss: LossName,
        stores: Sequence[RolloutStore],
        parts: Sequence[_Part],
        settings: FitSettings,
        folder: Path,
        desc: str,
        on_epoch: Callable[[Epoch], None] | None,
    ) -> FittedFunction:
        objective = self.settings.objective(function.network, loss)
        train, held_out = self._examples(function, loss, stores, parts)
        head, scale = function.network.head, None
        if "states" in train[0]:
            # Hidden states differ by orders of magnitude between their dimensions.
            assert head is not None
            scale = _moments(train, centred=head.bias)
            train, held_out = _standardised(train, scale), _standardised(held_out, scale)
            mean, std = scale
            function = _with_folded_inputs(function, -mean / std, 1 / std)
        config = function.network.network.config
        with Placement(self.mesh).active():
            packing = packing_for(config, train, held_out, settings)
        found = fit(
            objective,
            objective.initial(function.params),
            objective.frozen(function.params),
            train,
            held_out,
            settings,
            folder=folder / "checkpoints",
            progress=self.progress,
            desc=desc,
            on_epoch=on_epoch,
            arrange=packing,
            count=functools.partial(objective.work, function.params),
            mesh=self.mesh,
        )
        function = function.with_params(objective.combine(function.params, found.params))
        if scale is not None:
            function = _with_folded_inputs(function, *scale)
        readings = [self.tokens(rollout.prompt, rollout) for rollout in parts[0][0]]
        return FittedFunction(
            function,
            found.curve,
            found.best_epoch,
            lengths=np.asarray([len(prompt) + len(answer) for prompt, answer in readings]),
            prefixes=sum(int(example["prefixes"].sum()) for example in train),
            epochs=found.curve[-1].epoch,
            next_tokens=sum(
                int(example["prefixes"].sum()) * example["next_probabilities"].shape[-1]
                for example in train
                if "next_probabilities" in example
            ),
        )

    def _examples(
        self,
        function: ValueFunction,
        loss: LossName,
        stores: Sequence[RolloutStore],
        parts: Sequence[_Part],
    ) -> list[list[dict[str, np.ndarray]]]:
        """What each part is for the objective: hidden states where they do, else tokens."""
        if self._reads_states(function) and self.settings.trainable == "head":
            states = [self._states(stores, rollouts) for rollouts, _, _ in parts]
            length = max(len(x) for some in states for x in some)
            examples = []
            for some, (rollouts, rewards, targets) in zip(states, parts, strict=True):
                following = None
                if loss == "cdq":
                    of_part = [self.tokens(r.prompt, r) for r in rollouts]
                    following = self._next_states(function)(of_part)
                examples.append(state_examples(some, rewards, targets, following, length=length))
            return examples
        readings = [[self.tokens(r.prompt, r) for r in rollouts] for rollouts, _, _ in parts]
        length = bucket_length(max(len(p) + len(a) for some in readings for p, a in some))
        return [
            token_examples(some, rewards, targets, length=length)
            for some, (_, rewards, targets) in zip(readings, parts, strict=True)
        ]

    def _prepare(self, start: ValueFunction) -> ValueFunction:
        """What the fit starts from: a head of the right shape, and adapters if they are asked
        for."""
        chosen = self.settings
        function = start
        if chosen.trainable == "adapters":
            function = merge_adapters(function)
        network = function.network
        if chosen.head is not None and (network.head, network.layer) != (chosen.head, chosen.layer):
            moved = dataclasses.replace(network, head=chosen.head, layer=chosen.layer)
            function = self._with_new_head(
                dataclasses.replace(function, network=moved), chosen.head
            )
        if chosen.trainable == "adapters":
            function = with_adapters(
                function, rank=chosen.rank, targets=chosen.targets, seed=chosen.seed
            )
        return function

    def _for_sums(self, function: ValueFunction) -> ValueFunction:
        """The function with an output that can be any number."""
        head = function.network.head
        if head is None or head.output == "identity":
            return function
        return self._with_new_head(function, dataclasses.replace(head, output="identity"))

    def _with_new_head(self, function: ValueFunction, head: Head) -> ValueFunction:
        width = function.network.network.config.embed_dim
        params = dataclasses.replace(
            function.params, head=head.init(jax.random.key(self.settings.seed), width)
        )
        network = dataclasses.replace(function.network, head=head)
        return dataclasses.replace(function, network=network, params=params)

    def _next_states(self, function: ValueFunction) -> NextStates:
        found = self.next_states
        if found is None or not self._reads_states(function):
            raise ValueError(
                "loss='cdq' needs the policy's next tokens, and values that are heads on its hidden"
                " states. Got: values of another network"
            )
        assert self.states is not None
        same = found.policy.params is self.states.model.params
        if not same or found.depth != self.states.reader.depth:
            raise ValueError(
                "States behind next tokens must be those that the head reads. Got: depths"
                f" {found.depth!r} and {self.states.reader.depth!r}, or another model"
            )
        return found

    def _reads_states(self, function: ValueFunction) -> bool:
        return self.states is not None and self.states.serves(function)

    def _states(
        self,
        stores: Sequence[RolloutStore],
        rollouts: Sequence[Rollout],
    ) -> list[np.ndarray]:
        """Hidden states of some rollouts, computed shard by shard as their rewards were."""
        assert self.states is not None
        of_all: dict[tuple[int, str, int], np.ndarray] = {}
        for store in stores:
            for shard in _shards(store):
                groups = group_by_prompt([self.tokens(r.prompt, r) for r in shard])
                found = [x for of_prompt in self.states(groups) for x in of_prompt]
                of_all.update(zip(map(_name, shard), found, strict=True))
        return [of_all[_name(rollout)] for rollout in rollouts]


def _shards(store: RolloutStore) -> Iterator[list[Rollout]]:
    """The rollouts of each shard, which were scored together."""
    first = 0
    for shard in store.shards:
        yield [store[index] for index in range(first, first + shard.rollouts)]
        first += shard.rollouts


def _moments(
    examples: Sequence[dict[str, np.ndarray]], *, centred: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the hidden states at all prefixes.

    Args:
      centred: otherwise the mean is zero, and the deviation is from zero: a head without a bias
        has no place for a mean.
    """
    count = sum(int(example["prefixes"].sum()) for example in examples)
    mean = sum(example["states"].sum(axis=0, dtype=np.float64) for example in examples) / count
    mean *= centred
    spread = sum(
        (np.square(example["states"] - mean) * example["prefixes"][:, None]).sum(axis=0)
        for example in examples
    )
    return mean.astype(np.float32), np.sqrt(spread / count).astype(np.float32) + 1e-6


def _standardised(
    examples: Sequence[dict[str, np.ndarray]], scale: tuple[np.ndarray, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    mean, std = scale
    return [
        example
        | {
            name: (example[name] - mean) / std
            for name in ("states", "next_states")
            if name in example
        }
        for example in examples
    ]


def _with_folded_inputs(function: ValueFunction, mean: np.ndarray, std: np.ndarray):
    assert function.params.head is not None
    folded = fold_inputs(function.params.head, mean, std)
    return function.with_params(dataclasses.replace(function.params, head=folded))


def _rescaled(function: ValueFunction, mean: float, std: float) -> ValueFunction:
    """The function whose values are v * std + mean."""
    if (mean, std) == (0.0, 1.0):
        return function
    head, params = function.network.head, function.params.head
    if head is None or params is None:
        raise ValueError(
            "Rewards can be standardised for functions with a head of their own. Got: a score head"
        )
    folded = head.fold(params, float(mean), float(std))
    return function.with_params(dataclasses.replace(function.params, head=folded))


def _name(rollout: Rollout) -> tuple[int, str, int]:
    return rollout.iteration, rollout.prompt.id, rollout.candidate
