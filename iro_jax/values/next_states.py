"""Hidden states one token further: what CD-Q takes its expectation over.

Behind every prefix of an answer stand the policy's most probable next tokens, with their
probabilities and the hidden states after them. Neither changes while a head is fitted, so that they
are computed once. All of an answer's next tokens are read in one pass that forgets what comes after
their prefix; the answer is read once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models import Network, Params, Pretrained, pad_prompts
from iro_jax.models.cache import CachePart
from iro_jax.models.network import Depth
from iro_jax.models.sharding import where
from iro_jax.values.reading import slots_for

NextTokens: TypeAlias = tuple[Float[np.ndarray, "N+1 k D"], Float[np.ndarray, "N+1 k"]]
"""Of one answer: states after its prefixes' next tokens, and these tokens' probabilities."""


@dataclasses.dataclass(frozen=True)
class NextStates:
    """Reads the next tokens of answers.

    Attributes:
      policy: whose next tokens, and whose hidden states.
      layer: after so many blocks; None for after the final norm.
      count: k, the next tokens behind each prefix; their probabilities are made to sum to one.
      temperature: of the policy's distribution.
      rows: answers a batch.
    """

    policy: Pretrained
    layer: int | None = None
    count: int = 10
    temperature: float = 1.0
    rows: int = 8

    def __post_init__(self):
        if min(self.count, self.rows) < 1 or not self.temperature > 0:
            raise ValueError(
                "count and rows must be at least 1, and temperature positive."
                f" Got: {self.count}, {self.rows}, {self.temperature}"
            )

    @property
    def depth(self) -> Depth:
        return "hidden" if self.layer is None else self.layer

    def __call__(
        self, readings: Sequence[tuple[Int[np.ndarray, " S"], Int[np.ndarray, " N"]]]
    ) -> list[NextTokens]:
        """For each prompt and answer, what may come after the prompt and after each token."""
        slots = slots_for(max((len(answer) for _, answer in readings), default=0))
        found: list[NextTokens] = []
        for start in range(0, len(readings), self.rows):
            some = readings[start : start + self.rows]
            prompts = pad_prompts([prompt for prompt, _ in some], rows=self.rows)
            tokens = np.zeros((self.rows, slots), np.int32)
            mask = np.zeros(tokens.shape, bool)
            for row, (_, answer) in enumerate(some):
                tokens[row, : len(answer)] = answer
                mask[row, : len(answer)] = True
            arrays = (prompts.tokens, prompts.mask, tokens, mask, self.temperature)
            policy = self.policy
            with where(policy.params):
                states, probabilities = _read(
                    policy.network, policy.params, *arrays, depth=self.depth, count=self.count
                )
            states, probabilities = np.asarray(states), np.asarray(probabilities)
            for row, (_, answer) in enumerate(some):
                size = len(answer) + 1
                found.append((states[row, :size].copy(), probabilities[row, :size].copy()))
        return found


@functools.partial(jax.jit, static_argnames=("network", "depth", "count"))
def _read(
    network: Network,
    params: Params,
    prompts: Int[Array, "n S"],
    prompt_mask: Bool[Array, "n S"],
    answers: Int[Array, "n H"],
    answer_mask: Bool[Array, "n H"],
    temperature: Float[Array, ""],
    *,
    depth: Depth,
    count: int,
) -> tuple[Float[Array, "n 1+H k D"], Float[Array, "n 1+H k"]]:
    rows, length = answers.shape
    cache = network.empty_cache(
        num_prompts=rows, prompt_slots=prompts.shape[1], beam_slots=length, chunk_length=length
    )
    before, cache = network.prefill(params, cache, prompts, prompt_mask, want=("hidden",))
    after, cache = network.decode(
        params, cache, answers[:, None, None], answer_mask[:, None, None], want=("hidden",)
    )
    assert before.hidden is not None
    assert after.hidden is not None
    hidden = jnp.concatenate([before.hidden[:, None], after.hidden[:, 0, 0]], axis=1)
    logits = network.logits(params, hidden) / temperature
    chosen, tokens = jax.lax.top_k(logits, count)

    # The answer is one beam; every next token is a successor that keeps its own prefix of it.
    cache = cache.commit(jnp.zeros((rows, 1), jnp.int32))
    successors = (1 + length) * count
    chunk = CachePart.empty(network.config, (rows, 1, successors), 1)
    kept = jnp.repeat(jnp.arange(1 + length), count)
    outputs, _ = network.decode(
        params,
        dataclasses.replace(cache, chunk=chunk),
        tokens.reshape(rows, 1, successors, 1),
        want=(depth,),
        kept=jnp.broadcast_to(kept, (rows, 1, successors)),
    )
    states = outputs.at(depth).reshape(rows, 1 + length, count, -1)
    return states, jax.nn.softmax(chosen, axis=-1)
