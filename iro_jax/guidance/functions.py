"""From value functions to the scorer that sums them.

their backbone is the policy       heads on the policy's own hidden states, no extra pass
they share another frozen backbone heads stacked on it, read once
they have backbones of their own   a network each; those of one architecture can be stacked
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from iro_jax.guidance.guide import value_scorer
from iro_jax.guidance.scorers import (
    NoScore,
    PolicyHeads,
    PolicyHeadsParams,
    Scorer,
    Watching,
    WatchingParams,
)
from iro_jax.models import Pretrained
from iro_jax.models.network import Depth
from iro_jax.values import (
    Head,
    HeadParams,
    ValueFunction,
    ValueNetwork,
    ValueParams,
    stack,
    standalone,
)


def function_scorer(
    policy: Pretrained,
    functions: Sequence[ValueFunction],
    betas: Sequence[float],
    *,
    chunk_length: int = 16,
    chat: bool = False,
    stacked: bool | None = None,
    recomputed: bool = False,
) -> tuple[Scorer, object, PreTrainedTokenizerBase | None]:
    """A scorer for the sum of V_t / beta_t (equation 8).

    Args:
      policy: the model to guide.
      functions: V_0, V_1, ...
      betas: beta_t of each of them.
      chunk_length: L of the search.
      chat: whether prompts are conversations.
      stacked: whether networks of one architecture are read together; see `value_scorer`.
      recomputed: whether networks keep no keys and values; likewise.

    Returns:
      The scorer, its parameters, and the tokenizer it reads prompts with if that is not the
      policy's: the arguments of `Guide`.

    Raises:
      ValueError: betas are not positive numbers, one for each value function, the functions'
        tokenizers differ, or networks were to be both stacked and recomputed.
    """
    if (
        not functions
        or len(betas) != len(functions)
        or not all(0 < beta < math.inf for beta in betas)
    ):
        raise ValueError(
            f"betas must be {len(functions)} positive numbers, one for each of at least one value"
            f" function. Got: {list(betas)}"
        )
    if all(reads_policy(function, policy) for function in functions):
        scorer, params = _policy_heads(functions, betas)
        return scorer, params, None
    groups = shared_passes(functions)
    return value_scorer(
        policy,
        [group[0].model for group in groups],
        betas,
        networks=[_stacked(group) for group in groups],
        chunk_length=chunk_length,
        chat=chat,
        stacked=stacked,
        recomputed=recomputed,
    )


def watching(
    policy: Pretrained, function: ValueFunction, scorer: Scorer | None = None, params: object = None
) -> tuple[Scorer, object]:
    """The scorer and its parameters, with a value function that looks on; see `Watching`.

    Args:
      function: a head on the policy's hidden states.
      scorer, params: what guides; by default nothing does.

    Raises:
      ValueError: the function reads something else.
    """
    if not reads_policy(function, policy):
        raise ValueError("Only heads on the policy's own hidden states can look on. Got: another")
    heads, of_heads = _policy_heads([function], [1.0])
    guiding = NoScore() if scorer is None else scorer
    return Watching(guiding, heads), WatchingParams(params, of_heads)


def reads_policy(function: ValueFunction, policy: Pretrained) -> bool:
    """Whether a value function is a head on the policy's own hidden states."""
    return function.frozen and function.params.backbone is policy.params


def shared_passes(functions: Sequence[ValueFunction]) -> list[list[ValueFunction]]:
    """Neighbours that are read in one pass of a backbone, together."""
    return [list(group) for _, group in itertools.groupby(functions, key=_sharing)]


def _policy_heads(
    functions: Sequence[ValueFunction], betas: Sequence[float]
) -> tuple[PolicyHeads, PolicyHeadsParams]:
    def place(function: ValueFunction) -> tuple[Head, Depth]:
        head, layer = function.network.head, function.network.layer
        assert head is not None
        return head, "hidden" if layer is None else layer

    heads: list[Head] = []
    layers: list[Depth] = []
    params: list[HeadParams] = []
    for (head, layer), group in itertools.groupby(functions, key=place):
        heads.append(head)
        layers.append(layer)
        params.append(_heads_of(group))
    return (
        PolicyHeads(tuple(heads), tuple(layers)),
        PolicyHeadsParams(tuple(params), jnp.asarray(betas, jnp.float32)),
    )


def _sharing(function: ValueFunction) -> tuple[object, ...]:
    network = function.network
    own = network.head is None and not network.adapters
    return (network, id(function) if own else id(function.params.backbone))


def _stacked(group: Sequence[ValueFunction]) -> tuple[ValueNetwork, ValueParams]:
    network, params = standalone(group[0])
    if len(group) == 1:
        return network, params
    adapters = None
    if network.adapters:
        of_each = [standalone(function)[1].adapters for function in group]
        adapters = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *of_each)
    head = None if network.head is None else _heads_of(group)
    return (
        dataclasses.replace(network, num_values=len(group)),
        ValueParams(params.backbone, head, adapters),
    )


def _heads_of(group: Iterable[ValueFunction]) -> HeadParams:
    params = [function.params.head for function in group]
    assert all(head is not None for head in params)
    return stack([head for head in params if head is not None])
