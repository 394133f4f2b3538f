"""Guided answers of a frozen model that is only reached over an API.

The search is the same; its policy is an OpenAI-compatible completions endpoint that samples
chunks of text, and its tokens are the bytes of that text:

    Endpoint     asks a server for continuations of a text, many requests at a time
    ApiSampler   the `expand_fn`: every row's `prompt + answer so far` is continued
    ApiGuide     text in, answers out, like `Guide`; value networks read bytes by a `Bridge`

A chunk is up to L tokens of the server; the search does not know how many bytes these are,
so each chunk has room for several bytes a token. `ids < 256` are bytes, `END` ends an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from iro_jax.guidance.answers import (
    FinalChoice,
    Guided,
    Reward,
    Selection,
    Vote,
    in_order,
)
from iro_jax.guidance.api_sampler import BYTE_TOKENS, ApiSampler
from iro_jax.guidance.bridge import Bridge, BridgedValues, Crossing
from iro_jax.guidance.endpoint import END, Endpoint
from iro_jax.guidance.guide import value_sum
from iro_jax.guidance.params import GuidedParams
from iro_jax.guidance.scorers import (
    LogRatio,
    NoScore,
    PolicyHeads,
    Scorer,
    Sizes,
    ValueSum,
    ValueSumParams,
)
from iro_jax.models import (
    Conversation,
    Pretrained,
    Sampling,
    TextFormat,
    code_weights,
    pad_prompts,
    render,
)
from iro_jax.models.generate import KeyedBatch, batch_prompts, name_prompts
from iro_jax.models.sharding import where
from iro_jax.models.stop import cut
from iro_jax.models.text import Message, check_ids, end_of_turn
from iro_jax.search import (
    AcceptFirst,
    Candidates,
    HostSearch,
    Root,
    SearchOutput,
    SelectFn,
    diversity_first,
)
from iro_jax.values import AnyNetwork, ValueNetwork, ValueParams


class ApiGuide:
    """Answers text with text, guided, where the policy is behind an API.

    An answer's `tokens` are its bytes and `END`; `num_tokens` counts tokens of the server,
    and what a step samples behind a stop string counts too.

    Args:
      endpoint: the frozen model.
      scorer: what guides it, and `scorer_params`, its parameters: `NoScore`, or value
        networks that read bytes, from `api_value_scorer`.
      scorer_tokenizer: for prompts, if the scorer reads them.
      chat_tokenizer: the policy's, for prompts that are conversations: its chat template
        turns them into text.
      sampling: how tokens are drawn; without a `top_k` the server's default stays.
      beam_width, num_successors, chunk_length: K, B and L.
      max_new_tokens: longest answer, in tokens of the server.
      select_fn: which candidates survive.
      final_selection, reward, vote: what picks the answer, as in `Guide`.
      stop_strings: texts that end an answer. A server may be told of them too, to save what
        it would sample behind them, if it keeps them in its text: with vLLM by
        `extra_body={"stop": [...], "include_stop_str_in_output": True}`.
      batch_size: prompts that are searched at the same time.
      text_format: how prompts are rendered for the scorer; the server gets them whole. Its
        `max_length` is lowered to what the networks' contexts leave beside the answer.
      bytes_per_token: see `ApiSampler`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        scorer: Scorer = NoScore(),
        scorer_params: object = None,
        *,
        scorer_tokenizer: PreTrainedTokenizerBase | None = None,
        chat_tokenizer: PreTrainedTokenizerBase | None = None,
        sampling: Sampling = Sampling(),
        beam_width: int = 4,
        num_successors: int = 4,
        chunk_length: int = 16,
        max_new_tokens: int = 256,
        select_fn: SelectFn = diversity_first,
        final_selection: Selection = "value",
        reward: Reward | None = None,
        vote: Vote | None = None,
        stop_strings: Sequence[str] = (),
        batch_size: int = 8,
        text_format: TextFormat = TextFormat(),
        bytes_per_token: int = 16,
    ):
        for name, size in (
            ("beam_width", beam_width),
            ("num_successors", num_successors),
            ("batch_size", batch_size),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1. Got: {size}")
        if isinstance(select_fn, AcceptFirst):
            raise ValueError("AcceptFirst counts tokens, and a server's answers come as bytes")
        _check_scorer(scorer)
        if isinstance(scorer, BridgedValues) != (scorer_tokenizer is not None):
            raise ValueError("A scorer with a bridge and a scorer_tokenizer belong together")
        self.scorer = scorer
        self.scorer_tokenizer = scorer_tokenizer
        self.chat_tokenizer = chat_tokenizer
        self.batch_size = batch_size
        self.final_choice = FinalChoice(final_selection, reward, vote)
        self.stop_strings = tuple(stop_strings)
        self.sampler = ApiSampler(
            endpoint,
            sampling=sampling,
            chunk_length=chunk_length,
            max_new_tokens=max_new_tokens,
            bytes_per_token=bytes_per_token,
            stop_strings=stop_strings,
        )
        self.params = code_weights(GuidedParams({}, scorer_params))
        contexts = [n.network.config.context_length for n in _value_networks(scorer)]
        self.text_format = text_format.beside(max_new_tokens, contexts)
        self._sizes: dict[str, Any] = {
            "beam_width": beam_width,
            "num_successors": num_successors,
            "chunk_length": self.sampler.chunk_bytes,
            "max_steps": self.sampler.max_steps,
        }
        self._select_fn = select_fn
        self._compile()

    def __call__(
        self,
        prompts: Sequence[Conversation],
        *,
        seed: int = 0,
        prompt_ids: Sequence[str] | None = None,
        progress: bool = False,
    ) -> list[Guided]:
        """Answers prompts.

        Args:
          prompts: raw prompts, which the server gets as they are, or conversations.
          seed: of all draws; the answers are the same again if the server honours seeds.
          prompt_ids: names that the draws depend on; by default the prompts' indices.
          progress: whether to show a bar.

        Raises:
          ValueError: a prompt is empty, too long for the scorer or a conversation without a
            `chat_tokenizer` (nothing has been sampled then), or a score or reward is not
            finite.
          ApiError: see there.
        """
        names = name_prompts(prompts, prompt_ids)
        texts, rendered = [], []
        for index, prompt in enumerate(prompts):
            try:
                texts.append(self._text(prompt))
                rendered.append(self._render(prompt))
            except ValueError as error:
                raise ValueError(f"Prompt {index}: {error}") from error
        batches = batch_prompts(rendered, names, seed=seed, batch_size=self.batch_size)

        def answer(batch: KeyedBatch) -> list[Guided]:
            filling = [None] * (self.batch_size - len(batch.indices))
            self.sampler.start([*(texts[index] for index in batch.indices), *filling])
            with where(self.params):
                output = jax.device_get(self._search_batch(batch))
            found = [
                self.final_choice(prompts[index], output, row, self._read)
                for row, index in enumerate(batch.indices)
            ]
            return [
                dataclasses.replace(guided, num_tokens=num_tokens)
                for guided, num_tokens in zip(found, self.sampler.num_tokens(), strict=False)
            ]

        found = (
            pair for batch in batches for pair in zip(batch.indices, answer(batch), strict=True)
        )
        return in_order(found, len(prompts), progress=progress)

    def _compile(self) -> None:
        scorer, sizes = self.scorer, Sizes(**self._sizes)

        def root(params, tokens, mask) -> Root:
            scores, memory = scorer.root(params, tokens, mask, (), sizes)
            return Root(None, memory, scores)

        self._root = jax.jit(root)
        self._search = HostSearch(
            expand_fn=self.sampler,
            score_fn=scorer,
            select_fn=self._select_fn,
            observe_fn=_observe(scorer),
            expand_on_host=True,
            capacity=self._sizes["max_steps"] * self._sizes["chunk_length"],
            **self._sizes,
        )

    def _search_batch(self, batch: KeyedBatch) -> SearchOutput:
        unread = pad_prompts([np.zeros(1, np.int32)], length=1, rows=self.batch_size)
        prompts = batch.prompts[0] if batch.prompts else unread
        while True:
            try:
                root = self._root(self.params, prompts.tokens, prompts.mask)
                return self._search(self.params, batch.keys, root)
            except _TooNarrowError:
                assert isinstance(self.scorer, BridgedValues)
                wider = self.scorer.bridge.widened()
                self.scorer = dataclasses.replace(self.scorer, bridge=wider)
                self._compile()

    def _text(self, prompt: Conversation) -> str:
        if not prompt:
            raise ValueError("The prompt is empty")
        if isinstance(prompt, str):
            return prompt
        if self.chat_tokenizer is None:
            raise ValueError(
                "A completions endpoint takes text: pass a chat_tokenizer, or the text. Got: a"
                " conversation"
            )
        return chat_text(self.chat_tokenizer, prompt)

    def _render(self, prompt: Conversation) -> tuple[np.ndarray, ...]:
        if self.scorer_tokenizer is None:
            return ()
        ids = render(self.scorer_tokenizer, prompt, text_format=self.text_format)
        for network in _value_networks(self.scorer):
            check_ids(ids, network.network.config.vocab_size)
        return (ids,)

    def _read(self, tokens: tuple[int, ...]) -> str:
        text = b"".join(BYTE_TOKENS[token] for token in tokens).decode()
        return cut(text, self.stop_strings)


def api_value_scorer(
    models: Sequence[Pretrained],
    betas: Sequence[float],
    *,
    networks: Sequence[tuple[ValueNetwork, ValueParams]] | None = None,
    chunk_length: int = 16,
    chat: bool = False,
    stacked: bool | None = None,
    recomputed: bool = False,
) -> tuple[BridgedValues, ValueSumParams, PreTrainedTokenizerBase]:
    """A scorer from checkpoints for answers that are bytes.

    The arguments, and what is wrong with them, are those of `value_scorer`; there is no policy.

    Returns:
      The scorer, its parameters, and the tokenizer it reads prompts with: the arguments of
      `ApiGuide`.
    """
    values, params, tokenizer = value_sum(
        models, betas, networks, stacked=stacked, recomputed=recomputed
    )
    bridge = Bridge(
        BYTE_TOKENS,
        [END],
        tokenizer,
        end_of_turn(tokenizer, chat=chat),
        vocab_size=models[0].network.config.vocab_size,
        slots=2 * chunk_length,
    )
    return BridgedValues(values, bridge), params, tokenizer


def chat_text(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Message]) -> str:
    """A conversation as the text behind which the assistant's answer begins.

    The BOS with which a template begins is left out where the tokenizer puts one in front of
    any text, because then the server's does so too.

    Raises:
      ValueError: as `render` does, and for a conversation that ends with an answer.
    """
    render(tokenizer, conversation)
    messages = [dict(message) for message in conversation]
    if messages[-1]["role"] == "assistant":
        raise ValueError("The conversation has an answer already")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


class _TooNarrowError(Exception):
    """A bridge needs more slots."""


def _observe(scorer: Scorer) -> Any:
    """The scorer's part on the host; stops before the search goes on without a score."""
    if not isinstance(scorer, BridgedValues):
        return getattr(scorer, "observe", None)

    def observe(candidates: Candidates, memory: Any) -> Crossing:
        crossing = scorer.observe(candidates, memory)
        if np.any(crossing.counts < 0):
            raise _TooNarrowError
        return crossing

    return observe


def _check_scorer(scorer: Scorer) -> None:
    if isinstance(scorer, (ValueSum, PolicyHeads, LogRatio)):
        raise ValueError(
            "The tokens of a policy behind an API are unknown: what guides it reads text, as a"
            f" scorer of `api_value_scorer` does. Got: {type(scorer).__name__}"
        )
    if not isinstance(scorer, BridgedValues):
        return
    bridge = scorer.bridge
    if bridge.policy_tokens != BYTE_TOKENS or bridge.eos_ids != {END}:
        raise ValueError(
            "The bridge of a policy behind an API leads from bytes, as `api_value_scorer` makes"
            f" it. Got: one from {len(bridge.policy_tokens)} tokens"
        )
    for network in _value_networks(scorer):
        known, own = len(bridge.tokenizer), network.network.config.vocab_size
        if own < known:
            raise ValueError(
                f"The bridge's tokenizer has {known} tokens, more than a value network knows."
                f" Got: vocab_size={own}"
            )


def _value_networks(scorer: Scorer) -> tuple[AnyNetwork, ...]:
    return scorer.values.networks if isinstance(scorer, BridgedValues) else ()
