"""What a configuration says of a run's networks, searches and fits; nothing is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.devices import value_rules
from experiments.plan.architectures import architecture
from experiments.settings import loop_settings, search_settings, value_settings
from iro_jax.collect import SearchSettings
from iro_jax.guidance import (
    BridgedValues,
    GuidedSearch,
    NoScore,
    PolicyHeads,
    PolicyHeadsParams,
    Scorer,
    ValueSum,
    ValueSumParams,
)
from iro_jax.guidance.guide import bridge_slots
from iro_jax.models import Network, bucket_length
from iro_jax.models.config import Head as HeadKind
from iro_jax.models.lora import init_adapters
from iro_jax.models.network import Depth
from iro_jax.values import ValueNetwork, ValueParams, ValueSettings
from iro_jax.values.objectives import ValueObjective


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run without its weights.

    Attributes:
      name: of the configuration.
      policy: the frozen network.
      value: one value function; what it reads is the policy itself if `on_policy`.
      on_policy: whether values are heads on hidden states that the policy computes anyway.
      foreign: whether values have another tokenizer, so that a bridge drives searches from the
        host.
      reward: the network that scores answers, if there is one of its own.
      search, fitting: settings of the searches and of the fits.
      num_iterations: T, and so the number of value functions at the end.
      prompts: of an iteration.
      trained: share of the rollouts that fits train on.
      compress: whether a fit to their sum follows.
      prompt_tokens: that there is room for in a prompt.
      answer_tokens: that an answer is expected to have.
      mesh: sizes of the axes `data` (-1 for what the others leave), `fsdp` and `model`.
    """

    name: str
    policy: Network
    value: ValueNetwork
    on_policy: bool
    foreign: bool
    reward: Network | None
    search: SearchSettings
    fitting: ValueSettings
    num_iterations: int
    prompts: int
    trained: float
    compress: bool
    prompt_tokens: int
    answer_tokens: int
    mesh: dict[str, int]

    @property
    def separate(self) -> bool:
        """Whether every value function is a network of its own."""
        return not self.on_policy and self.fitting.trainable == "all"

    @property
    def value_slots(self) -> int:
        """Slots of a value network for the tokens of one chunk."""
        length = self.search.chunk_length
        return bridge_slots(length) if self.foreign else length

    def truncated(self, num_layers: int) -> Experiment:
        """The same with at most so many layers in every network."""

        def short(network: Network) -> Network:
            config = network.config
            return dataclasses.replace(
                network, config=config.replace(layers=config.layers[:num_layers])
            )

        value = self.value
        layer = None if value.layer is None else min(value.layer, num_layers)
        return dataclasses.replace(
            self,
            policy=short(self.policy),
            reward=None if self.reward is None else short(self.reward),
            value=dataclasses.replace(value, network=short(value.network), layer=layer),
        )

    def guided(self, num_values: int, *, capacity: int | None = None) -> GuidedSearch:
        """The search with so many value functions; without any, plain sampling of all candidates.

        Args:
          capacity: longest answer, instead of the configured one.
        """
        chosen = self.search
        length = chosen.max_new_tokens if capacity is None else capacity
        sizes: dict[str, Any] = {
            "beam_width": chosen.beam_width,
            "num_successors": chosen.num_successors,
            "chunk_length": chosen.chunk_length if num_values else length,
        }
        return GuidedSearch(
            self.policy,
            self.scorer(num_values),
            chosen.sampling,
            (0,),  # some token that ends answers; it makes no difference which
            capacity=length,
            select_fn=chosen.select_fn,
            **sizes,
        )

    def scorer(self, num_values: int) -> Scorer:
        if not num_values:
            return NoScore()
        if self.on_policy:
            assert self.value.head is not None
            depth: Depth = "hidden" if self.value.layer is None else self.value.layer
            return PolicyHeads((self.value.head,), (depth,))
        values = ValueSum(self.value_networks(num_values))
        if not self.foreign:
            return values
        known = self.policy.config.vocab_size
        return BridgedValues(values, _Slots(self.value_slots, range(known)))  # type: ignore[arg-type]

    def value_networks(self, num_values: int) -> tuple[ValueNetwork, ...]:
        """Each read in turn: networks of their own, or one that several functions share."""
        if self.separate:
            return (self.value,) * num_values
        return (dataclasses.replace(self.value, num_values=num_values),)

    def scorer_params(self, num_values: int) -> Any:
        """Abstract parameters of `scorer`, of the types that they are kept in."""
        betas: Any = jax.ShapeDtypeStruct((num_values,), jnp.float32)
        if not num_values:
            return None
        if self.on_policy:
            return PolicyHeadsParams((self._head(num_values),), betas)
        networks = tuple(map(self.value_params, self.value_networks(num_values)))
        return ValueSumParams(networks, betas)

    def value_params(self, value: ValueNetwork) -> ValueParams:
        """Abstract parameters of a value network."""
        config = value.network.config
        adapters = None
        if value.adapters:
            adapters = jax.eval_shape(
                lambda: init_adapters(
                    config,
                    jax.random.key(0),
                    copies=value.num_values,
                    rank=self.fitting.rank,
                    targets=self.fitting.targets,
                )
            )
        return ValueParams(weights(value.network), self._head(value.num_values), adapters)

    def _head(self, copies: int) -> Any:
        head = self.value.head
        if head is None:
            return None
        width = self.value.network.config.embed_dim
        return jax.eval_shape(lambda: head.init(jax.random.key(0), width, copies))

    def objective(self) -> ValueObjective:
        """What a fit minimises."""
        return self.fitting.objective(self.value, self.fitting.loss)


@dataclasses.dataclass(frozen=True)
class _Slots:
    """What programs need to know of a bridge; its tokenizers stay out of them."""

    slots: int
    policy_tokens: range
    tokenizer: tuple[()] = ()


def weights(network: Network) -> Any:
    """Abstract parameters of a network, of its own type."""
    dtype = jnp.dtype(network.config.dtype)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), network.abstract_params())


def describe(
    config: ConfigDict,
    *,
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
) -> Experiment:
    """What a configuration runs.

    Args:
      prompt_tokens: longest prompt; by default what the configuration cuts prompts to, or 512.
      answer_tokens: expected of an answer; by default the longest one.
    """
    search, loop, fitting = search_settings(config), loop_settings(config), value_settings(config)
    policy = Network(architecture(_name(config.policy), dtype=config.policy.dtype, head="logits"))
    on_policy = config.value.backbone == "policy" and fitting.trainable == "head"
    backbone = policy
    if config.value.backbone != "policy":
        head: HeadKind | None = "score" if fitting.head is None else None
        named = _name(config.value, "backbone")
        backbone = Network(architecture(named, head=head), rules=value_rules(config))
    adapters = fitting.trainable == "adapters"
    value = ValueNetwork(backbone, fitting.head, fitting.layer, adapters=adapters)
    if prompt_tokens is None:
        prompt_tokens = search.text_format.max_length or 512
    return Experiment(
        name=config.name,
        policy=policy,
        value=value,
        on_policy=on_policy,
        foreign=backbone.config.vocab_size != policy.config.vocab_size,
        reward=_reward(config, backbone),
        search=search,
        fitting=fitting,
        num_iterations=len(loop.betas),
        prompts=loop.prompts_per_iteration,
        trained=1 - loop.held_out,
        compress=loop.compress,
        prompt_tokens=bucket_length(prompt_tokens),
        answer_tokens=answer_tokens or search.max_new_tokens,
        mesh={axis: config.mesh[axis] for axis in ("data", "fsdp", "model")},
    )


def _reward(config: ConfigDict, backbone: Network) -> Network | None:
    """The reward model, if it is a network that stays in memory beside the value functions."""
    reward = config.task.get("reward")
    kind = None if reward is None else reward.get("kind")
    if kind == "pairs" and reward.trainable == "all":
        return backbone
    if kind == "model":
        named = reward.get("path") or reward.target
        return Network(architecture(named, head="score"), rules=backbone.rules)
    return None


def _name(section: ConfigDict, field: str = "name") -> str:
    """The name of a model, or the local path that stands for it."""
    path = section.get("path" if field == "name" else f"{field}_path")
    return path if path else section[field]
