"""A value function as a thing: backbone, head and tokenizer, fitted or about to be.

Where the backbone is frozen it is shared: heads of several value functions, and of a reward
model, then read the same hidden states, and if the backbone is the policy itself they cost no
pass of their own. What a value function looks like on disk is in `iro_jax.values.store`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import get_args

import jax
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from iro_jax.data import Prompt, Rollout
from iro_jax.models import Pretrained, TextFormat, render, same_tokenizer
from iro_jax.models.lora import Target, init_adapters, merge_into
from iro_jax.models.text import end_of_turn
from iro_jax.models.token_bytes import token_bytes
from iro_jax.rewards import Answer
from iro_jax.values.heads import Head
from iro_jax.values.network import ValueNetwork, ValueParams


@dataclasses.dataclass(frozen=True, eq=False)
class ValueFunction:
    """V(prefix): one value function.

    Attributes:
      model: the backbone as it was loaded, with the tokenizer that it reads text with.
      network: what becomes of the backbone's hidden states; T = 1.
      params: its parameters. `params.backbone is model.params` if the backbone is frozen.
      source: the name that loads the frozen backbone again; None if the function has to carry
        its own.
    """

    model: Pretrained
    network: ValueNetwork
    params: ValueParams
    source: str | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.model.tokenizer is None:
            raise ValueError(f"{self.model.origin}: there is no tokenizer")
        return self.model.tokenizer

    @property
    def frozen(self) -> bool:
        """Whether only the head is its own."""
        return self.params.backbone is self.model.params and self.params.adapters is None

    def with_params(self, params: ValueParams) -> ValueFunction:
        return dataclasses.replace(self, params=params)


def new_head(
    model: Pretrained,
    head: Head,
    *,
    layer: int | None = None,
    seed: int = 0,
    source: str | None = None,
) -> ValueFunction:
    """A fresh head on a frozen backbone.

    Args:
      layer: the hidden states it reads; None for those after the final norm.
      source: the backbone's name for `from_pretrained`, if it has one.
    """
    width = model.network.config.embed_dim
    params = ValueParams(model.params, head.init(jax.random.key(seed), width))
    return ValueFunction(model, ValueNetwork(model.network, head, layer), params, source)


def with_adapters(
    function: ValueFunction, *, rank: int, targets: Sequence[Target] = get_args(Target), seed: int
) -> ValueFunction:
    """The same function with LoRA adapters that change nothing yet.

    Raises:
      ValueError: it has some already.
    """
    if function.network.adapters:
        raise ValueError("The value function has adapters already. Got: another rank")
    config = function.network.network.config
    adapters = init_adapters(config, jax.random.key(seed), copies=1, rank=rank, targets=targets)
    network = dataclasses.replace(function.network, adapters=True)
    return dataclasses.replace(
        function,
        network=network,
        params=dataclasses.replace(function.params, adapters=adapters),
    )


def merge_adapters(function: ValueFunction) -> ValueFunction:
    """The same function with its adapters multiplied into a backbone of its own."""
    adapters = function.params.adapters
    if adapters is None:
        return function
    backbone = merge_into(function.params.backbone, adapters)
    return dataclasses.replace(
        function,
        model=dataclasses.replace(function.model, params=backbone),
        network=dataclasses.replace(function.network, adapters=False),
        params=dataclasses.replace(function.params, backbone=backbone, adapters=None),
        source=None,
    )


def standalone(function: ValueFunction) -> tuple[ValueNetwork, ValueParams]:
    """The function as a network for itself, without blocks that its head does not read."""
    network, params = function.network, function.params
    if network.layer is None or network.layer == network.network.config.num_layers:
        return network, params
    short, backbone = network.network.truncate(params.backbone, network.layer)
    adapters = None if params.adapters is None else params.adapters[: network.layer]
    return (
        dataclasses.replace(network, network=short),
        dataclasses.replace(params, backbone=backbone, adapters=adapters),
    )


class AnswerTokens:
    """Prompts and answers as a value function reads them, in training as in a search.

    With the policy's tokenizer an answer is the very tokens that were sampled. With another one,
    it is the text of these tokens in its own, and the token that ends an answer if they end with
    the policy's; see `iro_jax.guidance.bridge`. What nobody sampled is read as its text.

    Args:
      tokenizer: of the value function.
      policy: with which answers were sampled.
      text_format: how prompts are rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        policy: Pretrained,
        *,
        text_format: TextFormat = TextFormat(),
    ):
        if policy.tokenizer is None:
            raise ValueError(f"{policy.origin}: there is no tokenizer")
        self.of_policy = same_tokenizer(tokenizer, policy.tokenizer)
        # One vocabulary may come with two chat templates; the search reads the policy's.
        self.tokenizer = policy.tokenizer if self.of_policy else tokenizer
        self.text_format = text_format
        self._eos_ids = frozenset(policy.eos_ids)
        self._pieces: tuple[bytes, ...] = ()
        if not self.of_policy:
            self._pieces = token_bytes(policy.tokenizer, policy.network.config.vocab_size)
        self._prompts: dict[str, np.ndarray] = {}
        self._end = functools.cache(functools.partial(end_of_turn, self.tokenizer))

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raises a ValueError where a prompt is empty or too long."""
        for prompt in prompts:
            try:
                self._prompt(prompt)
            except ValueError as error:
                raise ValueError(f"Prompt {prompt.id!r}: {error}") from error

    def _prompt(self, prompt: Prompt) -> Int[np.ndarray, " S"]:
        ids = self._prompts.get(prompt.id)
        if ids is None:
            ids = render(self.tokenizer, prompt.conversation, text_format=self.text_format)
            self._prompts[prompt.id] = ids
        return ids

    def __call__(
        self, prompt: Prompt, answer: Answer | Rollout
    ) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " N"]]:
        """The prompt's tokens, and the answer's."""
        ids = self._prompt(prompt)
        if self.of_policy and len(answer.tokens):
            return ids, np.asarray(answer.tokens, np.int32)
        text, ended = answer.text, answer.finished
        if len(answer.tokens):
            text = b"".join(self._pieces[token] for token in answer.tokens).decode(errors="replace")
            ended = answer.tokens[-1] in self._eos_ids
        found = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if ended:
            chat = not isinstance(prompt.conversation, str)
            found.append(self._end(chat=chat))
        return ids, np.asarray(found, np.int32)
