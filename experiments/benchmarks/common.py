"""What benchmarks of speed share: their setting, scorers with random heads, and turns of programs.

The setting is the paper's search, K = B = 4 and L = 16, of prompts of one length whose answers
never end early. Only speed and memory are looked at: heads and adapters are random.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from iro_jax.guidance import (
    GuidedParams,
    GuidedSearch,
    NoScore,
    PolicyHeads,
    PolicyHeadsParams,
    Scorer,
    ValueSum,
    ValueSumParams,
    value_scorer,
)
from iro_jax.models import (
    Network,
    Params,
    Pretrained,
    Sampling,
    code_weights,
    pad_prompts,
    prompt_keys,
)
from iro_jax.models.lora import init_adapters
from iro_jax.values import Head, RecomputedNetwork, ValueNetwork, ValueParams

HEAD = Head()
SAMPLING = Sampling(0.7, top_k=50)

Run: TypeAlias = Callable[[], object]
Scoring: TypeAlias = tuple[Scorer, object]
"""A scorer and its parameters."""


def random_prompts(vocab_size: int, number: int, length: int) -> list[np.ndarray]:
    """Prompts of one length, of ordinary tokens."""
    rng = np.random.default_rng(0)
    highest = min(20_000, vocab_size)
    return [rng.integers(highest // 20, highest, length) for _ in range(number)]


def separate_networks(model: Pretrained, number: int) -> Scoring:
    """Value networks with weights of their own, all with the model's architecture."""
    network = ValueNetwork(model.network, HEAD)
    networks = [
        (network, ValueParams(_copy(model.params), _heads(model, 1, seed=t))) for t in range(number)
    ]
    models, betas = [model] * number, [1.0] * number
    return value_scorer(model, models, betas, networks=networks)[:2]


def shared_heads(model: Pretrained, number: int) -> Scoring:
    """Heads on one further copy of the network."""
    network = ValueNetwork(model.network, HEAD, num_values=number)
    params = ValueParams(_copy(model.params), _heads(model, number))
    return ValueSum((network,)), ValueSumParams((params,), jnp.ones(number))


def shared_adapters(model: Pretrained, number: int, rank: int) -> Scoring:
    """LoRA adapters, each with a head, on one further copy of the network.

    They differ: rows that are equal would be multiplied once for all of them.
    """
    network = ValueNetwork(model.network, HEAD, num_values=number, adapters=True)
    adapters = init_adapters(model.network.config, jax.random.key(0), copies=number, rank=rank)
    leaves, structure = jax.tree.flatten(adapters)
    noise = iter(jax.random.split(jax.random.key(1), len(leaves)))
    moved = [leaf + 0.01 * jax.random.normal(next(noise), leaf.shape) for leaf in leaves]
    adapters = jax.tree.unflatten(structure, moved)
    params = ValueParams(_copy(model.params), _heads(model, number), adapters)
    return ValueSum((network,)), ValueSumParams((params,), jnp.ones(number))


def recomputed(scoring: Scoring) -> Scoring:
    """A sum of value networks that keep no keys and values."""
    scorer, params = scoring
    assert isinstance(scorer, ValueSum)
    networks = [network for network in scorer.networks if isinstance(network, ValueNetwork)]
    assert len(networks) == len(scorer.networks)
    return ValueSum(tuple(map(RecomputedNetwork, networks))), params


def policy_heads(model: Pretrained, number: int) -> Scoring:
    """Heads on the policy's own final states."""
    params = PolicyHeadsParams((_heads(model, number),), jnp.ones(number))
    return PolicyHeads((HEAD,), ("hidden",)), params


def coded_weights(params: Params) -> Params | None:
    """`code_weights`; None if none of them can be coded."""
    coded = code_weights(params)
    # Codes and lines take the place of one array.
    return coded if len(jax.tree.leaves(coded)) > len(jax.tree.leaves(params)) else None


def _copy(params: Params) -> Params:
    return jax.tree.map(jnp.copy, params)


def _heads(model: Pretrained, copies: int, seed: int = 0):
    return HEAD.init(jax.random.key(seed), model.network.config.embed_dim, copies)


def guided(policy: Network, scorer: Scorer, new_tokens: int) -> GuidedSearch:
    """The paper's search, of answers of so many tokens."""
    return GuidedSearch(policy, scorer, SAMPLING, (), capacity=new_tokens)


def unguided(policy: Network, new_tokens: int) -> GuidedSearch:
    """Plain sampling: one answer a prompt."""
    return GuidedSearch(
        policy,
        NoScore(),
        SAMPLING,
        (),
        beam_width=1,
        num_successors=1,
        chunk_length=new_tokens,
        capacity=new_tokens,
    )


def arguments(
    search: GuidedSearch, policy: Params, scorer: object, number: int, length: int
) -> tuple[GuidedParams, Array, np.ndarray, np.ndarray]:
    """What a search of so many prompts is called with."""
    batch = pad_prompts(random_prompts(search.policy.config.vocab_size, number, length))
    keys = prompt_keys(0, [str(index) for index in range(number)])
    return GuidedParams(policy, scorer), keys, batch.tokens, batch.mask


def compiled(search: GuidedSearch, called_with: tuple[object, ...]) -> tuple[Run, float]:
    """A search that is ready to run, and the memory that its program takes, in bytes.

    The memory is what is alive at once: arguments, outputs and temporaries.
    """
    program = jax.jit(search).lower(*called_with).compile()
    return functools.partial(program, *called_with), sum(memory(program).values())


def memory(program: jax.stages.Compiled) -> dict[str, float]:
    """Bytes of a program's arguments, outputs and temporaries; what is aliased counts once."""
    found = program.memory_analysis()
    assert found is not None
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def seconds(run: Run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def medians(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of programs that take turns, after one call of each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: float(np.median(some)) for name, some in taken.items()}


def setting(name: str) -> str:
    """What stands above a table: the model, the device and the version of JAX."""
    return f"{name}, {jax.devices()[0].device_kind}, JAX {jax.__version__}"
