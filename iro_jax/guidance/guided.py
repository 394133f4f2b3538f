"""Guided search of a network's answers, from arrays to arrays in one program."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from iro_jax.guidance.params import GuidedParams
from iro_jax.guidance.policy import PolicySampler, Segments, TopTokens
from iro_jax.guidance.scorers import NoScore, Scorer, Sizes
from iro_jax.models import Network, Sampling
from iro_jax.search import (
    ContinuousSearch,
    HostSearch,
    Root,
    SearchOutput,
    SelectFn,
    diversity_first,
    search,
)

_UNGUIDED = NoScore()
_PLAIN = Sampling()


@dataclasses.dataclass(frozen=True)
class GuidedSearch:
    """A policy, what guides it, and the sizes of the search: static and hashable.

    Calling it on arrays searches; the caller jits. Defaults are the paper's.

    Attributes:
      policy: the frozen network.
      scorer: what guides it.
      sampling: how the policy's tokens are drawn.
      eos_ids: tokens that end an answer.
      beam_width: K.
      num_successors: B.
      chunk_length: L.
      capacity: H, the longest answer in tokens that there is room for.
      select_fn: which candidates survive; see `iro_jax.search.selection`.
      reuse_finished: see `iro_jax.search.search`.
      successors: `sampled` chunks, or the B most probable `top_tokens`, with L = 1.
      segments: where sampled chunks end before L tokens; None where they do not.
    """

    policy: Network
    scorer: Scorer = _UNGUIDED
    sampling: Sampling = _PLAIN
    eos_ids: tuple[int, ...] = ()
    beam_width: int = 4
    num_successors: int = 4
    chunk_length: int = 16
    capacity: int = 256
    select_fn: SelectFn = diversity_first
    reuse_finished: bool = False
    successors: Literal["sampled", "top_tokens"] = "sampled"
    segments: Segments | None = None

    def __post_init__(self):
        for name in ("beam_width", "num_successors", "chunk_length", "capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got: {getattr(self, name)}")
        if self.policy.config.head != "logits":
            raise ValueError("A policy needs a language-model head. Got: head='score'")
        vocabulary = self.policy.config.vocab_size
        if any(not 0 <= eos < vocabulary for eos in self.eos_ids):
            raise ValueError(f"eos_ids must be below {vocabulary}. Got: {self.eos_ids}")
        if self.successors not in ("sampled", "top_tokens"):
            raise ValueError(
                f"successors must be 'sampled' or 'top_tokens'. Got: {self.successors!r}"
            )
        if self.successors == "top_tokens" and (
            self.chunk_length != 1 or self.num_successors > vocabulary or self.segments
        ):
            raise ValueError(
                f"The most probable tokens make chunks of one token, at most {vocabulary} of them."
                f" Got: chunk_length={self.chunk_length}, num_successors={self.num_successors},"
                f" segments={self.segments}"
            )
        self.scorer.check(self.policy)

    @property
    def max_steps(self) -> int:
        """S: the most chunks of an answer."""
        shortest = self.chunk_length
        if self.segments is not None:
            shortest = min(shortest, self.segments.min_tokens)
        return -(-self.capacity // shortest)

    @property
    def expand_fn(self) -> PolicySampler:
        kind = TopTokens if self.successors == "top_tokens" else PolicySampler
        return kind(
            self.policy,
            self.sampling,
            self.eos_ids,
            self.chunk_length,
            self.scorer.features,
            self.segments,
        )

    def root(
        self,
        params: GuidedParams,
        tokens: Int[Array, "P S"],
        mask: Bool[Array, "P S"],
        scorer_prompts: tuple[Any, Any] | None = None,
    ) -> Root:
        """Reads the prompts with the policy and the scorer. The arguments are those of a call."""
        if tokens.shape[0] < 1:
            raise ValueError("A search needs at least one prompt. Got: an empty batch")
        sizes = Sizes(self.beam_width, self.num_successors, self.chunk_length, self.max_steps)
        memory, features = self.expand_fn.root(
            params,
            tokens,
            mask,
            beam_width=self.beam_width,
            num_successors=self.num_successors,
            max_steps=self.max_steps,
        )
        if scorer_prompts is not None:
            tokens, mask = scorer_prompts
        scores, score_memory = self.scorer.root(params, tokens, mask, features, sizes)
        return Root(memory, score_memory, scores)

    def __call__(
        self,
        params: GuidedParams,
        keys: Key[Array, " P"],
        tokens: Int[Array, "P S"],
        mask: Bool[Array, "P S"],
        max_new_tokens: int | Int[Array, "*lead"] | None = None,
        scorer_prompts: tuple[Any, Any] | None = None,
    ) -> SearchOutput:
        """Searches for answers.

        Args:
          params: weights of the policy and the scorer.
          keys: one key a prompt; see `iro_jax.models.prompt_keys`.
          tokens: prompts, padded anywhere.
          mask: which tokens are real; each prompt has at least one.
          max_new_tokens: longest answer, at most `capacity`, which is the default. May be
            traced, and may differ between prompts.
          scorer_prompts: the prompts' `(tokens, mask)` for a scorer with another tokenizer.

        Raises:
          ValueError: see `iro_jax.search.search`.
        """
        if isinstance(max_new_tokens, int) and not 1 <= max_new_tokens <= self.capacity:
            raise ValueError(
                f"max_new_tokens must be in 1..{self.capacity}, the capacity. Got: {max_new_tokens}"
            )
        limit = self.capacity if max_new_tokens is None else max_new_tokens
        return search(
            params,
            keys,
            self.root(params, tokens, mask, scorer_prompts),
            max_new_tokens=jnp.asarray(limit, jnp.int32),
            **self._pieces,
        )

    def on_host(self) -> HostSearch:
        """The same search driven from Python, for scorers that need the host.

        It takes `params`, keys and `root`. Keep it: it holds the compiled programs.
        """
        return HostSearch(observe_fn=getattr(self.scorer, "observe", None), **self._pieces)

    def continuous(self, batch_size: int) -> ContinuousSearch:
        """The same search of any number of prompts, so many together; see `ContinuousSearch`.

        Prompts are `(tokens, mask)`, `[N, S]` each. Keep it: it holds the compiled programs.
        """
        return ContinuousSearch(root_fn=self.root, batch_size=batch_size, **self._pieces)

    @property
    def _pieces(self) -> dict[str, Any]:
        return {
            "expand_fn": self.expand_fn,
            "score_fn": self.scorer,
            "select_fn": self.select_fn,
            "beam_width": self.beam_width,
            "num_successors": self.num_successors,
            "chunk_length": self.chunk_length,
            "capacity": self.capacity,
            "max_steps": self.max_steps,
            "reuse_finished": self.reuse_finished,
        }
