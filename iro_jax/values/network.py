"""Value functions with a network of their own: V(prefix) for T value functions in one pass.

    ValueNetwork(network)                      a score network: T = 1
    ValueNetwork(network, head, num_values=T)  T heads on one shared backbone, read once
    ValueNetwork(network, head, num_values=T,  T LoRA adapters on one backbone, with a head
                 adapters=True)                each: one batched pass that reads it once

Separate networks of one architecture can be read as one: `iro_jax.values.stacked`. Heads on the
policy's own hidden states need no network; see `iro_jax.guidance.PolicyHeads`.
Letters: P prompts, K beams, B successors, N new tokens, T value functions, D width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models.cache import Cache
from iro_jax.models.lora import Adapters
from iro_jax.models.network import Network, Outputs, Params, Want
from iro_jax.values.heads import Head, HeadParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueParams:
    """Parameters of a `ValueNetwork`; what it does not have is None."""

    backbone: Params
    head: HeadParams | None = None
    adapters: Adapters | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueMemory:
    """What a value network remembers during a search.

    Attributes:
      cache: of the prefixes; with adapters, of T times the prompts, adapter by adapter.
      kept: how many of its beam's tokens each candidate has, `[T * P, K, B]`; None for all, and
        after a commit.
    """

    cache: Cache
    kept: Int[Array, "TP K B"] | None = None

    def commit(self, parents: Int[Array, "P K"]) -> ValueMemory:
        copies = self.cache.prompt.lengths.shape[0] // parents.shape[0]
        cache = self.cache.commit(jnp.tile(parents, (copies, 1)), self.kept)
        return ValueMemory(cache)

    def admit(self, rows: Int[Array, " A"], newcomers: ValueMemory) -> ValueMemory:
        copies = newcomers.cache.prompt.lengths.shape[0] // rows.shape[0]
        prompts = self.cache.prompt.lengths.shape[0] // copies
        of_copies = jnp.arange(copies)[:, None] * prompts + rows
        return ValueMemory(self.cache.admit(of_copies.reshape(-1), newcomers.cache))


@dataclasses.dataclass(frozen=True)
class ValueNetwork:
    """T value functions that share one pass.

    Attributes:
      network: the backbone. Its own head is only used where `head` is None, and must then be
        a score head.
      head: heads on its hidden states.
      layer: which hidden states: after that many blocks, or None for after the final norm.
      num_values: T.
      adapters: whether each value function has a LoRA adapter of its own.
    """

    network: Network
    head: Head | None = None
    layer: int | None = None
    num_values: int = 1
    adapters: bool = False

    def __post_init__(self):
        if self.num_values < 1:
            raise ValueError(f"num_values must be at least 1. Got: {self.num_values}")
        if self.head is None:
            if self.network.config.head != "score" or self.layer is not None:
                raise ValueError(
                    "A value network without a head of its own needs a backbone with a score"
                    f" head, on its last layer. Got: {self.network.config.head!r},"
                    f" layer={self.layer}"
                )
            if self.num_values != 1 and not self.adapters:
                raise ValueError(f"A score head is one value. Got: num_values={self.num_values}")
        layers = self.network.config.num_layers
        if self.layer is not None and not 0 <= self.layer <= layers:
            raise ValueError(f"layer must be in 0..{layers}. Got: {self.layer}")

    @property
    def _copies(self) -> int:
        return self.num_values if self.adapters else 1

    @property
    def _want(self) -> tuple[Want, ...]:
        if self.head is None:
            return ("score",)
        return ("hidden" if self.layer is None else self.layer,)

    def forward(
        self,
        params: ValueParams,
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        raw: bool = False,
        remat: bool = False,
    ) -> Float[Array, "batch length T *atoms"]:
        """The values of every prefix of whole sequences; arbitrary at padding.

        Args:
          segments: of rows that hold several sequences; as in `Network.forward`.
          raw: what the head has before its output function, for losses; see `Head.logits`.
          remat: as in `Network.forward`.
        """
        outputs = self.network.forward(
            params.backbone,
            self._tile(tokens),
            self._tile(mask),
            want=self._want,
            adapters=params.adapters,
            segments=None if segments is None else self._tile(segments),
            remat=remat,
        )
        return self._values(params, outputs, raw=raw)

    def prefill(
        self,
        params: ValueParams,
        tokens: Int[Array, "P S"],
        mask: Bool[Array, "P S"],
        **sizes: int,
    ) -> tuple[Float[Array, "P T"], ValueMemory]:
        """Reads prompts; `sizes` are those of `Cache.empty` without the prompts'."""
        cache = self.network.empty_cache(
            num_prompts=self._copies * tokens.shape[0], prompt_slots=tokens.shape[1], **sizes
        )
        outputs, cache = self.network.prefill(
            params.backbone,
            cache,
            self._tile(tokens),
            self._tile(mask),
            want=self._want,
            adapters=params.adapters,
        )
        return self._values(params, outputs), ValueMemory(cache)

    def extend(
        self,
        params: ValueParams,
        memory: ValueMemory,
        tokens: Int[Array, "P K B N"],
        mask: Bool[Array, "P K B N"],
        kept: Int[Array, "P K B"] | None = None,
    ) -> tuple[Float[Array, "P K B T"], ValueMemory]:
        """The values at each candidate's last new token, from the new tokens alone.

        Args:
          memory: of the beams, with an empty chunk.
          tokens: the candidates' chunks.
          mask: which tokens are real; what is returned where none is, is arbitrary.
          kept: how many of its beam's tokens each candidate continues from; all by default.
        """
        kept = None if kept is None else self._tile(kept)
        positions = jnp.arange(mask.shape[-1])
        outputs, cache = self.network.decode(
            params.backbone,
            memory.cache,
            self._tile(tokens),
            self._tile(mask),
            want=self._want,
            adapters=params.adapters,
            kept=kept,
            at=self._tile(jnp.max(jnp.where(mask, positions, 0), axis=-1)),
        )
        return self._values(params, outputs), ValueMemory(cache, kept)

    def _tile(self, x: Array) -> Array:
        return jnp.tile(x, (self._copies, *(1,) * (x.ndim - 1)))

    def _values(self, params: ValueParams, outputs: Outputs, *, raw: bool = False) -> Array:
        if self.head is None:
            assert outputs.score is not None
            split = outputs.score.reshape(self._copies, -1, *outputs.score.shape[1:])
            return jnp.moveaxis(split, 0, -1)
        features = outputs.at("hidden" if self.layer is None else self.layer)
        assert params.head is not None
        if self.adapters:
            features = features.reshape(self._copies, -1, *features.shape[1:])
            logits = self.head.logits_of_copies(params.head, features)
        else:
            logits = self.head.logits(params.head, features)
        return logits if raw else self.head.values(logits)
