"""Softmax over slots that come a few at a time (Milakov and Gimelshein 2018).

A row keeps the largest score so far, and the weights' sum and the weighted values relative to
it. XLA and kernels run the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

# Finite, so that a row that has seen nothing yet yields exp(0) * 0, not exp(-inf + inf).
HIDDEN = -1e30


class State(NamedTuple):
    """Attention so far: weighted values, sum of weights, and the score both are relative to."""

    numerator: Float[Array, "*batch rows D"]
    denominator: Float[Array, "*batch rows 1"]
    maximum: Float[Array, "*batch rows 1"]


def nothing_seen(shape: tuple[int, ...]) -> State:
    """The state to begin with, of queries `[*batch, rows, D]`."""
    column = (*shape[:-1], 1)
    return State(
        numerator=jnp.zeros(shape, jnp.float32),
        denominator=jnp.zeros(column, jnp.float32),
        maximum=jnp.full(column, HIDDEN, jnp.float32),
    )


def absorb(
    state: State,
    queries: Float[Array, "*batch rows D"],
    keys: Float[Array, "*batch slots D"],
    values: Float[Array, "*batch slots D"],
    visible: Bool[Array, "*#batch rows slots"],
    softcap: float | None,
) -> State:
    """The state after attending to these slots as well."""
    visible = jnp.broadcast_to(visible, (*queries.shape[:-1], keys.shape[-2]))
    scores = _cap(_matmul(queries, keys, contract=-1), softcap)
    scores = jnp.where(visible, scores, HIDDEN)
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - maximum), 0.0)
    scale = jnp.exp(state.maximum - maximum)
    return State(
        numerator=scale * state.numerator
        + _matmul(weights.astype(values.dtype), values, contract=-2),
        denominator=scale * state.denominator + jnp.sum(weights, axis=-1, keepdims=True),
        maximum=maximum,
    )


def merge(states: Sequence[State]) -> Float[Array, "*rows D"]:
    """The attention output of several states, each with a leading axis of as many again."""
    state = State(*(jnp.concatenate(x) for x in zip(*states, strict=True)))
    scale = jnp.exp(state.maximum - jnp.max(state.maximum, axis=0))
    return normalise(
        jnp.sum(scale * state.numerator, axis=0), jnp.sum(scale * state.denominator, axis=0)
    )


def normalise(
    numerator: Float[Array, "*rows D"], denominator: Float[Array, "*rows 1"]
) -> Float[Array, "*rows D"]:
    return numerator / jnp.maximum(denominator, 1e-37)


def _matmul(
    x: Float[Array, "*batch rows n"], y: Float[Array, "*batch a b"], contract: int
) -> Float[Array, "*batch rows m"]:
    """Products of `x`'s last axis with axis `contract` of `y`, in f32 throughout for f32."""
    batch = tuple(range(x.ndim - 2))
    return lax.dot_general(
        x,
        y,
        (((x.ndim - 1,), (y.ndim + contract,)), (batch, batch)),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _cap(scores: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
