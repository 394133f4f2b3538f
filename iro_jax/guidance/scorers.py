"""What guides a search: the `score_fn`s, and how they read the prompts.

    ValueSum      sum over value networks of V_t / beta_t (equation 8); a reward model on
                  prefixes is one of them with beta 1
    PolicyHeads   the same for heads on the policy's own hidden states: no extra pass
    LogRatio      log-ratio of a tuned and an untuned language model
    NoScore       nothing: plain sampling, best-of-N
    Watching      any of them beside heads on the policy's hidden states that only look on

All of them score a chunk from its own tokens and what they remember of the prefix.
Letters: P prompts, K beams, B successors, L chunk tokens, T value functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from iro_jax.guidance.params import GuidedParams
from iro_jax.models import Cache, Network, Params
from iro_jax.models.cache import inherit
from iro_jax.models.network import Depth
from iro_jax.search import Candidates, Scores
from iro_jax.search.tree import take
from iro_jax.values import (
    AnyMemory,
    AnyNetwork,
    Head,
    HeadParams,
    ValueParams,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a search: `beam_width`, `num_successors`, `chunk_length`, `max_steps`."""

    beam_width: int
    num_successors: int
    chunk_length: int
    max_steps: int


class Scorer(Protocol):
    """A `score_fn` that can read prompts."""

    @property
    def features(self) -> tuple[Depth, ...]:
        """The policy's hidden states that it wants; see `PolicySampler`."""

    def root(
        self,
        params: GuidedParams,
        tokens: Int[Array, "P S"],
        mask: Bool[Array, "P S"],
        features: tuple[Float[Array, "P D"], ...],
        sizes: Sizes,
    ) -> tuple[Scores, Any]:
        """The scores of the bare prompts, `[P]`, and the memory."""
        ...

    def __call__(
        self, params: GuidedParams, candidates: Candidates, memory: Any
    ) -> tuple[Scores, Any]: ...

    def check(self, policy: Network) -> None:
        """Raises a ValueError where it cannot read the policy's tokens."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueSumParams:
    """Parameters of a `ValueSum`.

    Attributes:
      networks: one entry for each of them.
      betas: beta_t of every value function, in the same order, `[T]`.
    """

    networks: tuple[ValueParams, ...]
    betas: Float[Array, " T"]


@dataclasses.dataclass(frozen=True)
class ValueSum:
    """The sum of V_t(prefix) / beta_t over the value functions of one or more networks.

    Attributes:
      networks: each read in turn; what one network, or one stack of them, holds is read in one
        pass.
    """

    networks: tuple[AnyNetwork, ...]
    features: tuple[Depth, ...] = dataclasses.field(default=(), init=False)

    def __post_init__(self):
        if not self.networks:
            raise ValueError("A sum needs at least one value network. Got: networks=()")

    @property
    def num_values(self) -> int:
        """T."""
        return sum(network.num_values for network in self.networks)

    def check(self, policy: Network) -> None:
        for network in self.networks:
            check_vocabulary(policy, network.network, "A value network")

    def root(self, params, tokens, mask, features, sizes):
        del features
        check_betas(params.scorer.betas, self.num_values)
        values, memories = [], []
        for network, of_network in self._with_params(params):
            value, memory = network.prefill(
                of_network,
                tokens,
                mask,
                beam_width=sizes.beam_width,
                beam_slots=sizes.max_steps * sizes.chunk_length,
                num_successors=sizes.num_successors,
                chunk_length=sizes.chunk_length,
            )
            values.append(value)
            memories.append(memory)
        return weighted_sum(values, params.scorer.betas), tuple(memories)

    def __call__(self, params, candidates, memory):
        inside = jnp.arange(candidates.tokens.shape[-1]) < candidates.chunk_lengths[..., None]
        return self.extend(params, candidates.tokens, inside, memory)

    def extend(
        self,
        params: GuidedParams,
        tokens: Int[Array, "P K B N"],
        mask: Bool[Array, "P K B N"],
        memory: tuple[AnyMemory, ...],
        kept: Int[Array, "P K B"] | None = None,
    ) -> tuple[Scores, tuple[AnyMemory, ...]]:
        """Scores chunks of tokens; see `ValueNetwork.extend`."""
        values, memories = [], []
        for (network, of_network), of_memory in zip(self._with_params(params), memory, strict=True):
            value, extended = network.extend(of_network, of_memory, tokens, mask, kept)
            values.append(value)
            memories.append(extended)
        return weighted_sum(values, params.scorer.betas), tuple(memories)

    def _with_params(self, params: GuidedParams):
        return zip(self.networks, params.scorer.networks, strict=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyHeadsParams:
    """Parameters of `PolicyHeads`: of each group of heads, and beta_t of all, `[T]`."""

    heads: tuple[HeadParams, ...]
    betas: Float[Array, " T"]


@dataclasses.dataclass(frozen=True)
class PolicyHeads:
    """Heads on the hidden states that the policy computes anyway.

    Attributes:
      heads: groups of heads of one shape.
      layers: for each group what it reads: `hidden`, or the number of a layer.
    """

    heads: tuple[Head, ...]
    layers: tuple[Depth, ...]

    def __post_init__(self):
        if not self.heads or len(self.heads) != len(self.layers):
            raise ValueError(
                "PolicyHeads needs at least one group of heads and a layer for each."
                f" Got: {len(self.heads)} groups and {len(self.layers)} layers"
            )

    @property
    def features(self) -> tuple[Depth, ...]:
        return tuple(dict.fromkeys(self.layers))

    def check(self, policy: Network) -> None:
        allowed = ("hidden", *range(policy.config.num_layers + 1))
        if set(self.layers) - set(allowed):
            raise ValueError(
                "Heads on the policy read 'hidden' or a layer in"
                f" 0..{policy.config.num_layers}. Got: {self.layers}"
            )

    def root(self, params, tokens, mask, features, sizes):
        del tokens, mask, sizes
        count = sum(group[0]["kernel"].shape[0] for group in params.scorer.heads)
        check_betas(params.scorer.betas, count)
        return self._scores(params, features), None

    def __call__(self, params, candidates, memory):
        return self._scores(params, candidates.features), memory

    def _scores(self, params: GuidedParams, features: tuple[Array, ...]) -> Scores:
        by_layer = dict(zip(self.features, features, strict=True))
        groups = zip(self.heads, self.layers, params.scorer.heads, strict=True)
        values = [head(of_head, by_layer[layer]) for head, layer, of_head in groups]
        return weighted_sum(values, params.scorer.betas)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogRatioParams:
    """Weights of the two language models of a `LogRatio`."""

    tuned: Params
    untuned: Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ModelMemory:
    cache: Cache
    hidden: Float[Array, "P K B D"]

    def commit(self, parents: Int[Array, "P K"]) -> _ModelMemory:
        return _ModelMemory(self.cache.commit(parents), inherit(self.hidden, parents))

    def admit(self, rows: Int[Array, " A"], newcomers: _ModelMemory) -> _ModelMemory:
        hidden = self.hidden.at[rows].set(newcomers.hidden)
        return _ModelMemory(self.cache.admit(rows, newcomers.cache), hidden)


@dataclasses.dataclass(frozen=True)
class LogRatio:
    """log pi_tuned(y|x) - log pi_untuned(y|x), summed over tokens with the EOS.

    The implicit reward of weak-to-strong search (arXiv 2405.19262). One value function.
    """

    tuned: Network
    untuned: Network
    features: tuple[Depth, ...] = dataclasses.field(default=(), init=False)

    def check(self, policy: Network) -> None:
        for network in (self.tuned, self.untuned):
            check_vocabulary(policy, network, "A model of the log-ratio")
            if network.config.head != "logits":
                raise ValueError("A log-ratio needs language models. Got: head='score'")

    def root(self, params, tokens, mask, features, sizes):
        del features
        lead = (tokens.shape[0], sizes.beam_width, sizes.num_successors)

        def read(network: Network, weights: Params) -> _ModelMemory:
            cache = network.empty_cache(
                num_prompts=tokens.shape[0],
                prompt_slots=tokens.shape[1],
                beam_width=sizes.beam_width,
                beam_slots=sizes.max_steps * sizes.chunk_length,
                num_successors=sizes.num_successors,
                chunk_length=sizes.chunk_length,
            )
            outputs, cache = network.prefill(weights, cache, tokens, mask, want=("hidden",))
            assert outputs.hidden is not None
            width = outputs.hidden.shape[-1]
            hidden = jnp.broadcast_to(outputs.hidden[:, None, None], (*lead, width))
            return _ModelMemory(cache, hidden)

        zero = jnp.zeros(tokens.shape[0])
        memory = (
            read(self.tuned, params.scorer.tuned),
            read(self.untuned, params.scorer.untuned),
        )
        return Scores(zero, zero[:, None]), memory

    def __call__(self, params, candidates, memory):
        inside = jnp.arange(candidates.tokens.shape[-1]) < candidates.chunk_lengths[..., None]
        tuned, untuned = memory
        gain, tuned = _log_likelihood(
            self.tuned, params.scorer.tuned, candidates.tokens, inside, tuned
        )
        loss, untuned = _log_likelihood(
            self.untuned, params.scorer.untuned, candidates.tokens, inside, untuned
        )
        before = take(candidates.beams.scores.total, candidates.rows)[..., None]
        total = before + gain - loss
        return Scores(total, total[..., None]), (tuned, untuned)


@dataclasses.dataclass(frozen=True)
class NoScore:
    """Zero for everything: selection falls back on its order, or on log-probabilities."""

    features: tuple[Depth, ...] = dataclasses.field(default=(), init=False)

    def check(self, policy: Network) -> None:
        del policy

    def root(self, params, tokens, mask, features, sizes):
        del params, mask, features, sizes
        return self._zeros(tokens.shape[:1]), None

    def __call__(self, params, candidates, memory):
        del params
        return self._zeros(candidates.new.shape), memory

    @staticmethod
    def _zeros(lead: tuple[int, ...]) -> Scores:
        return Scores(jnp.zeros(lead), jnp.zeros((*lead, 0)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WatchingParams:
    """Parameters of a `Watching`: the scorer's and the heads'."""

    scorer: Any
    heads: PolicyHeadsParams


@dataclasses.dataclass(frozen=True)
class Watching:
    """A scorer, and heads on the policy's hidden states that have no say.

    Their values stand in `parts` behind the scorer's own. A reward that is such a head is thereby
    known of every finalist, without another pass over the answers.

    Attributes:
      scorer: what guides.
      heads: what looks on.
    """

    scorer: Scorer
    heads: PolicyHeads

    @property
    def features(self) -> tuple[Depth, ...]:
        return tuple(dict.fromkeys((*self.scorer.features, *self.heads.features)))

    def check(self, policy: Network) -> None:
        self.scorer.check(policy)
        self.heads.check(policy)

    def root(self, params, tokens, mask, features, sizes):
        guiding, watching = self._split(params)
        of_scorer = self._wanted(self.scorer, features)
        scores, memory = self.scorer.root(guiding, tokens, mask, of_scorer, sizes)
        of_heads = self._wanted(self.heads, features)
        seen, _ = self.heads.root(watching, tokens, mask, of_heads, sizes)
        return _beside(scores, seen), memory

    def __call__(self, params, candidates, memory):
        guiding, watching = self._split(params)

        def for_(scorer: Scorer) -> Candidates:
            return dataclasses.replace(
                candidates, features=self._wanted(scorer, candidates.features)
            )

        scores, memory = self.scorer(guiding, for_(self.scorer), memory)
        seen, _ = self.heads(watching, for_(self.heads), None)
        return _beside(scores, seen), memory

    def _split(self, params: GuidedParams) -> tuple[GuidedParams, GuidedParams]:
        of_both: WatchingParams = params.scorer
        return (
            dataclasses.replace(params, scorer=of_both.scorer),
            dataclasses.replace(params, scorer=of_both.heads),
        )

    def _wanted(self, scorer: Scorer, features: tuple[Array, ...]) -> tuple[Array, ...]:
        by_depth = dict(zip(self.features, features, strict=True))
        return tuple(by_depth[depth] for depth in scorer.features)


def _beside(scores: Scores, seen: Scores) -> Scores:
    return Scores(scores.total, jnp.concatenate([scores.parts, seen.parts], axis=-1))


def weighted_sum(values: Sequence[Float[Array, "*lead Ti"]], betas: Float[Array, " T"]) -> Scores:
    """Sum of V_t / beta_t (equation 8)."""
    parts = jnp.concatenate(values, axis=-1)
    return Scores(jnp.sum(parts / betas, axis=-1), parts)


def check_betas(betas: Array, count: int) -> None:
    if betas.shape != (count,):
        raise ValueError(
            f"There must be one beta for each of the {count} value functions."
            f" Got: betas of shape {betas.shape}"
        )


def check_vocabulary(policy: Network, network: Network, what: str) -> None:
    """Raises a ValueError where a network has no embedding for a token of the policy."""
    of_policy, own = policy.config.vocab_size, network.config.vocab_size
    if own < of_policy:
        raise ValueError(
            f"{what} does not know the policy's vocabulary of {of_policy} tokens; a network with"
            f" another tokenizer needs a `Bridge`. Got: vocab_size={own}"
        )


def _log_likelihood(
    network: Network,
    params: Params,
    tokens: Int[Array, "P K B L"],
    inside: Bool[Array, "P K B L"],
    memory: _ModelMemory,
) -> tuple[Float[Array, "P K B"], _ModelMemory]:
    """Sum of the chunk's log-probabilities; logits are held for one token at a time."""
    outputs, cache = network.decode(params, memory.cache, tokens, inside, want=("hidden",))
    assert outputs.hidden is not None
    previous = jnp.concatenate([memory.hidden[:, :, :, None], outputs.hidden[:, :, :, :-1]], 3)

    def of_token(hidden_and_token):
        hidden, token = hidden_and_token
        logits = network.logits(params, hidden)
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    log_probs = lax.map(of_token, (jnp.moveaxis(previous, 3, 0), jnp.moveaxis(tokens, 3, 0)))
    total = jnp.sum(jnp.where(jnp.moveaxis(inside, 3, 0), log_probs, 0.0), axis=0)
    count = jnp.sum(inside, axis=-1)
    last = jnp.maximum(count - 1, 0)[..., None, None]
    hidden = jnp.take_along_axis(outputs.hidden, last, axis=3)[:, :, :, 0]
    hidden = jnp.where(count[..., None] > 0, hidden, memory.hidden)
    return total, _ModelMemory(cache, hidden)
