"""Hidden states and values at every prefix of stored answers.

`StateCache` remembers the hidden states of a frozen backbone, which rewards, fits, compression and
health checks share; `prefix_values` and `head_values` give a function's values from tokens or from
such states.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from iro_jax.models import Pretrained, bucket_length
from iro_jax.models.network import Depth
from iro_jax.models.sharding import where
from iro_jax.values.function import ValueFunction
from iro_jax.values.heads import Head, HeadParams
from iro_jax.values.network import ValueNetwork, ValueParams
from iro_jax.values.reading import Group, StateReader

_CACHE_BYTES = 4 * 2**30
_ROWS = 32
_BLOCK = 1024


class StateCache:
    """Hidden states of a frozen backbone that were computed before need not be again.

    What is computed together is one list of groups, and a list is found again by its content,
    so that a continued run, whose cache is empty, gets the same bits.
    """

    def __init__(self, model: Pretrained, layer: int | None, reader: StateReader | None = None):
        self.model = model
        depth: Depth = "hidden" if layer is None else layer
        self.reader = reader or StateReader(model.network, depth)
        self._found: dict[bytes, list[list[np.ndarray]]] = {}
        self._bytes = 0

    def __call__(self, groups: Sequence[Group], *, keep: bool = True) -> list[list[np.ndarray]]:
        """The hidden states of each group's answers; see `StateReader`."""
        digest = hashlib.sha256()
        for prompt, answers in groups:
            for tokens in (prompt, *answers):
                digest.update(np.int64(len(tokens)).tobytes())
                digest.update(np.asarray(tokens, np.int32).tobytes())
        key = digest.digest()
        if key in self._found:
            return self._found[key]
        states = self.reader(self.model.params, groups)
        size = sum(array.nbytes for group in states for array in group)
        if keep and self._bytes + size <= _CACHE_BYTES:
            self._found[key] = [[array.copy() for array in group] for group in states]
            self._bytes += size
        return states

    def serves(self, function: ValueFunction) -> bool:
        """Whether the function is a head on these hidden states."""
        layer = function.network.layer
        depth = "hidden" if layer is None else layer
        shared = function.frozen and function.params.backbone is self.model.params
        return shared and function.network.head is not None and depth == self.reader.depth


def group_by_prompt(
    readings: Sequence[tuple[Int[np.ndarray, " S"], Int[np.ndarray, " N"]]],
) -> list[Group]:
    """Neighbours with the same prompt as one group."""
    groups: list[tuple[np.ndarray, list[np.ndarray]]] = []
    for prompt, answer in readings:
        if groups and np.array_equal(groups[-1][0], prompt):
            groups[-1][1].append(answer)
        else:
            groups.append((prompt, [answer]))
    return list(groups)


def prefix_values(
    function: ValueFunction,
    readings: Sequence[tuple[Int[np.ndarray, " S"], Int[np.ndarray, " N"]]],
) -> list[Float[np.ndarray, " N+1"]]:
    """V after each prompt and each token of its answer, from whole sequences."""
    if not readings:
        return []
    length = bucket_length(max(len(prompt) + len(answer) for prompt, answer in readings))
    found = []
    for start in range(0, len(readings), _ROWS):
        some = readings[start : start + _ROWS]
        tokens = np.zeros((_ROWS, length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[:, 0] = True
        for row, reading in enumerate(some):
            ids = np.concatenate(reading)
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        with where(function.params.backbone):
            found_values = _forward(function.params, tokens, mask, network=function.network)
        values = np.asarray(found_values)
        for row, (prompt, answer) in enumerate(some):
            found.append(values[row, len(prompt) - 1 : len(prompt) + len(answer), 0])
    return found


def head_values(function: ValueFunction, states: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The values of hidden states `[n_i, D]`, by the function's head."""
    head, params = function.network.head, function.params.head
    assert head is not None
    assert params is not None
    if not states:
        return []
    ends = np.cumsum([len(x) for x in states])
    together = np.concatenate(states)
    # In blocks of one size: a program is compiled for each shape.
    blocks = np.pad(together, ((0, -len(together) % _BLOCK), (0, 0)))
    values = [
        np.asarray(_apply(params, block, head=head))[:, 0]
        for block in np.split(blocks, len(blocks) // _BLOCK)
    ]
    return np.split(np.concatenate(values)[: len(together)], ends[:-1])


@functools.partial(jax.jit, static_argnames="network")
def _forward(
    params: ValueParams, tokens: Array, mask: Array, *, network: ValueNetwork
) -> Float[Array, "rows length T"]:
    return network.forward(params, tokens, mask)


@functools.partial(jax.jit, static_argnames="head")
def _apply(params: HeadParams, states: Array, *, head: Head) -> Float[Array, "rows T"]:
    return head(params, states)
