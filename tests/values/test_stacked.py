"""Stacked networks say what each of them says, in one program of a single one's products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from iro_jax.testing import tiny_network
from iro_jax.values import Head, StackedNetworks, ValueNetwork, ValueParams, stack_networks
from iro_jax.values import stacked as stacked_module

SIZES = {"beam_width": 3, "num_successors": 2, "chunk_length": 4, "beam_slots": 12}
BACKBONE, SCORING = tiny_network(), tiny_network(head="score")
LEAD = (2, 3, 2)


def scoring(seed):
    params = jax.tree.map(lambda x: 8 * x, SCORING.init(jax.random.key(seed)))
    return ValueNetwork(SCORING), ValueParams(params)


def headed(seed, count=2, width=8):
    backbone = jax.tree.map(lambda x: 8 * x, BACKBONE.init(jax.random.key(seed)))
    head = Head((width,))
    heads = head.init(jax.random.key(seed + 100), BACKBONE.config.embed_dim, count)
    return ValueNetwork(BACKBONE, head, layer=1, num_values=count), ValueParams(backbone, heads)


KINDS = {
    "score heads": [scoring(seed) for seed in range(3)],
    "two heads each": [headed(seed) for seed in range(3)],
}


def read(networks, chunks, kept=None):
    """The values of two prompts and of chunks after each other, with commits in between."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 64, (2, 16)).astype(np.int32)
    mask = np.arange(16) < np.array([[11], [16]])
    found, memories = [], []
    for network, params in networks:
        values, memory = network.prefill(params, tokens, mask, **SIZES)
        found.append(values)
        memories.append(memory)
    everything = [jnp.concatenate(found, axis=-1)]
    for step in range(chunks):
        new = rng.integers(4, 64, (*LEAD, 4)).astype(np.int32)
        real = np.arange(4) < rng.integers(1, 5, LEAD)[..., None]
        parents = rng.integers(0, 6, (2, 3)).astype(np.int32)
        found = []
        for index, (network, params) in enumerate(networks):
            left = None
            if kept is not None:
                left = jnp.full(LEAD, kept[step], jnp.int32)
            values, memory = network.extend(params, memories[index], new, real, left)
            found.append(values)
            memories[index] = memory.commit(parents)
        everything.append(jnp.concatenate(found, axis=-1))
    return everything


def check_equal(networks, chunks=3, kept=None):
    stacks = stack_networks(networks, stacked=True)

    def of(some):
        weights = [params for _, params in some]

        def run(weights):
            pairs = [(network, w) for (network, _), w in zip(some, weights, strict=True)]
            return read(pairs, chunks, kept)

        return jax.device_get(jax.jit(run)(weights))

    for one, other in zip(of(networks), of(stacks), strict=True):
        assert np.ptp(one) > 0.1
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    return stacks


@pytest.mark.parametrize("kind", KINDS)
def test_values_after_chunks_and_commits_are_those_read_in_turn(kind):
    [(network, _)] = check_equal(KINDS[kind])
    assert network == StackedNetworks(KINDS[kind][0][0], 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_beam_can_be_read_again(kind):
    check_equal(KINDS[kind], kept=(0, 1, 2))


def test_only_neighbours_of_one_architecture_are_put_together():
    wide = headed(3, width=16)
    networks = [scoring(0), scoring(1), wide, headed(4), headed(5), scoring(2)]
    stacks = check_equal(networks, chunks=1)
    assert [network.num_values for network, _ in stacks] == [2, 2, 4, 1]
    assert [isinstance(network, StackedNetworks) for network, _ in stacks] == [1, 0, 1, 0]


def test_parameters_of_another_type_are_read_in_turn():
    network, params = scoring(1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    networks = [scoring(0), (network, half)]
    assert stack_networks(networks, stacked=True) == networks


def count(jaxpr, name):
    """How often a primitive stands in a program, inner ones included."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == name
        found += sum(count(inner, name) for inner in jaxprs_in_params(equation.params))
    return found


def test_a_stack_has_the_products_of_one_network():
    networks = KINDS["two heads each"]

    def products(some):
        return count(jax.make_jaxpr(lambda: read(some, 1))().jaxpr, "dot_general")

    one = products(networks[:1])
    assert one > 0
    assert products(networks) == 3 * one
    assert products(stack_networks(networks, stacked=True)) == one


def test_cursors_positions_and_lengths_are_held_once():
    [(network, params)] = stack_networks(KINDS["score heads"], stacked=True)
    tokens = np.full((2, 16), 5, np.int32)
    one, of_one = KINDS["score heads"][0]

    def shapes(network, params):
        def prefill(params):
            return network.prefill(params, tokens, tokens > 0, **SIZES)[1]

        return jax.eval_shape(prefill, params)

    for part, alone in zip(
        *(
            (cache.prompt, cache.beams, cache.chunk)
            for cache in (shapes(network, params).of_each.cache, shapes(one, of_one).cache)
        ),
        strict=True,
    ):
        assert part.keys[0].shape == (3, *alone.keys[0].shape)
        for name in ("positions", "lengths", "cursor"):
            assert getattr(part, name).shape == getattr(alone, name).shape


@pytest.mark.parametrize(
    ("platform", "limit", "want"), [("cpu", 1 << 40, 3), ("gpu", 1 << 40, 1), ("gpu", 1, 3)]
)
def test_by_default_small_networks_are_stacked_on_accelerators(monkeypatch, platform, limit, want):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(stacked_module, "STACK_LIMIT", limit)
    assert len(stack_networks(KINDS["score heads"])) == want


def test_memory_lets_other_prompts_in():
    """What is admitted is read on as if it had been there from the beginning."""
    networks = KINDS["two heads each"]
    [(network, params)] = stack_networks(networks, stacked=True)
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, 64, (3, 16)).astype(np.int32)
    new = rng.integers(4, 64, (3, 3, 2, 4)).astype(np.int32)

    def prefill(tokens):
        return network.prefill(params, tokens, tokens > 0, **SIZES)[1]

    @jax.jit
    def both():
        admitted = prefill(tokens[:2]).admit(jnp.array([1]), prefill(tokens[2:]))
        values, _ = network.extend(params, admitted, new[::2], new[::2] > 0)
        want, _ = network.extend(params, prefill(tokens), new, new > 0)
        return values, want[::2]

    values, want = both()
    np.testing.assert_allclose(values, want, atol=1e-5, rtol=1e-5)
