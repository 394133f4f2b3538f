"""A tiny policy with every kind of scorer, and prompts for them."""

import jax
import jax.numpy as jnp
import numpy as np

from iro_jax.guidance import (
    GuidedParams,
    GuidedSearch,
    LogRatio,
    LogRatioParams,
    NoScore,
    PolicyHeads,
    PolicyHeadsParams,
    ValueSum,
    ValueSumParams,
)
from iro_jax.models import Sampling, pad_prompts
from iro_jax.models.lora import init_adapters
from iro_jax.testing import tiny_network
from iro_jax.values import Head, ValueNetwork, ValueParams

EOS = (2, 3)
POLICY = tiny_network()
SIZES = {"beam_width": 3, "num_successors": 2, "chunk_length": 4, "capacity": 16}


def weights(network, seed, scale=8.0):
    return jax.tree.map(lambda x: scale * x, network.init(jax.random.key(seed)))


def scored():
    """Scorers with their parameters, by name."""
    score_network = tiny_network(head="score")
    head = Head((8,))
    shared = ValueNetwork(POLICY, head, layer=1, num_values=3)
    adapted = ValueNetwork(POLICY, Head(), num_values=2, adapters=True)
    adapters = init_adapters(POLICY.config, jax.random.key(8), copies=2, rank=2)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    return {
        "nothing": (NoScore(), None),
        "two networks": (
            ValueSum((ValueNetwork(score_network),) * 2),
            ValueSumParams(
                tuple(ValueParams(weights(score_network, seed)) for seed in (1, 2)),
                jnp.array([1.0, 2.0]),
            ),
        ),
        "shared backbone": (
            ValueSum((shared,)),
            ValueSumParams(
                (ValueParams(weights(POLICY, 3), head.init(jax.random.key(4), 16, 3)),),
                jnp.array([1.0, 2.0, 2.5]),
            ),
        ),
        "adapters": (
            ValueSum((adapted,)),
            ValueSumParams(
                (ValueParams(weights(POLICY, 3), Head().init(jax.random.key(5), 16, 2), adapters),),
                jnp.array([1.0, 1.0]),
            ),
        ),
        "policy heads": (
            PolicyHeads((head, Head()), (2, "hidden")),
            PolicyHeadsParams(
                (head.init(jax.random.key(6), 16, 2), Head().init(jax.random.key(7), 16, 1)),
                jnp.array([1.0, 1.0, 0.5]),
            ),
        ),
        "log-ratio": (
            LogRatio(POLICY, POLICY),
            LogRatioParams(weights(POLICY, 9), weights(POLICY, 10, 4.0)),
        ),
    }


def guided(scorer, **changes):
    """A search of the tiny policy."""
    return GuidedSearch(POLICY, scorer, Sampling(0.9, top_k=20), EOS, **(SIZES | changes))


def guided_params(scorer_params, **changes):
    return GuidedParams(weights(POLICY, 0), scorer_params, **changes)


def prompts(number, seed=0, longest=20):
    """Random prompts of 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 64, size=rng.integers(1, longest + 1)) for _ in range(number)]


def batch(some, length=32, rows=None):
    padded = pad_prompts(some, length=length, rows=rows)
    return padded.tokens, padded.mask
