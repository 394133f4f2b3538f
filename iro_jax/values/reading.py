"""Hidden states of a frozen backbone behind every prefix of answers.

Fits of heads, their health checks and rewards that are heads all need them, and they never
change. A prompt is read once for all of its answers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models import Network, Params, bucket_length, pad_prompts
from iro_jax.models.network import Depth
from iro_jax.models.sharding import where

T = TypeVar("T")

Group = tuple[Int[np.ndarray, " S"], Sequence[Int[np.ndarray, " N"]]]
"""A prompt and some answers to it."""


def read_answers(
    network: Network,
    params: Params,
    prompts: Int[Array, "P S"],
    prompt_mask: Bool[Array, "P S"],
    answers: Int[Array, "P N H"],
    answer_mask: Bool[Array, "P N H"],
    *,
    depth: Depth,
) -> Float[Array, "P N 1+H D"]:
    """Hidden states after the bare prompt and after every token of its answers.

    Args:
      network: static, like `depth`.
      depth: `hidden` for after the final norm, or after so many blocks.
    """
    num_prompts, num_answers, length = answers.shape
    cache = network.empty_cache(
        num_prompts=num_prompts,
        prompt_slots=prompts.shape[1],
        num_successors=num_answers,
        chunk_length=length,
    )
    before, cache = network.prefill(params, cache, prompts, prompt_mask, want=(depth,))
    after, _ = network.decode(params, cache, answers[:, None], answer_mask[:, None], want=(depth,))
    first = jnp.broadcast_to(
        before.at(depth)[:, None, None], (num_prompts, num_answers, 1, network.config.embed_dim)
    )
    return jnp.concatenate([first, after.at(depth)[:, 0]], axis=2)


_MOST_TOKENS = 16384
"""Places of a batch for answers: with longer ones, attention between them would not fit."""


@dataclasses.dataclass(frozen=True)
class StateReader:
    """Reads groups of answers in batches of one shape.

    Attributes:
      network: the backbone.
      depth: which hidden states; see `read_answers`.
      rows: prompts a batch; fewer where their answers are long.
      answers: most answers of a row, which has room for as many as the groups need; a prompt with
        more of them takes several rows.
    """

    network: Network
    depth: Depth
    rows: int = 8
    answers: int = 16

    def __call__(
        self, params: Params, groups: Sequence[Group]
    ) -> list[list[Float[np.ndarray, "N+1 D"]]]:
        """The hidden states of each group's answers, each after the prompt and its N tokens.

        What is computed together depends on `groups` alone, so that the same call gives the
        same bits again.
        """
        rows = [
            (index, prompt, some)
            for index, (prompt, answers) in enumerate(groups)
            for some in _batched(answers, self.answers)
        ]
        slots = slots_for(max((len(x) for _, _, some in rows for x in some), default=0))
        # Powers of two, for few programs.
        most = max((len(some) for _, _, some in rows), default=1)
        columns = min(self.answers, 1 << (most - 1).bit_length())
        fitting = max(1, _MOST_TOKENS // (columns * slots))
        together = min(self.rows, 1 << (fitting.bit_length() - 1))
        found: list[list[np.ndarray]] = [[] for _ in groups]
        for batch in _batched(rows, together):
            padded = pad_prompts([prompt for _, prompt, _ in batch], rows=together)
            tokens = np.zeros((together, columns, slots), np.int32)
            mask = np.zeros(tokens.shape, bool)
            for row, (_, _, answers) in enumerate(batch):
                for column, answer in enumerate(answers):
                    tokens[row, column, : len(answer)] = answer
                    mask[row, column, : len(answer)] = True
            arrays = (padded.tokens, padded.mask, tokens, mask)
            with where(params):
                read = _read(self.network, params, *arrays, depth=self.depth)
            states = np.asarray(read)
            for row, (index, _, answers) in enumerate(batch):
                found[index] += [
                    states[row, column, : len(answer) + 1] for column, answer in enumerate(answers)
                ]
        return found


def slots_for(length: int) -> int:
    """Places for answers of so many tokens: few sizes, since a program is compiled for each."""
    return max(1, -(-length // 8) * 8) if length <= 64 else bucket_length(length)


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@functools.partial(jax.jit, static_argnames=("network", "depth"))
def _read(network, params, prompts, prompt_mask, answers, answer_mask, *, depth):
    return read_answers(network, params, prompts, prompt_mask, answers, answer_mask, depth=depth)
