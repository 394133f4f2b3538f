"""Guided search of networks: its scores against whole prefixes.

However beams are reordered, what a scorer computes from a chunk and its memory is what a pass over
the whole prefix gives. Letters: P prompts, K beams, U candidates, S steps, V vocabulary, T value
functions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.guidance.guided import GuidedSearch
from iro_jax.guidance.params import GuidedParams
from iro_jax.guidance.scorers import (
    LogRatio,
    LogRatioParams,
    PolicyHeads,
    PolicyHeadsParams,
    Scorer,
    ValueSum,
    ValueSumParams,
)
from iro_jax.models import Layer, Rope, prompt_keys
from iro_jax.models.lora import init_adapters
from iro_jax.search import finalists
from iro_jax.testing import tiny_network
from iro_jax.values import Head, ValueNetwork, ValueParams

TOLERANCE = 1e-4
CHUNK_LENGTH, CAPACITY, MAX_STEPS = 3, 23, 8
POLICY = tiny_network()
OTHER_SIZES = {
    "embed_dim": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "layers": (Layer(Rope(10000.0, 8), window=6), Layer(Rope(10000.0, 8))),
}


def normal_like(shapes, seed, deviation):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, deviation, x.shape), jnp.float32), shapes
    )


def init(network, seed):
    """Weights large enough that logits and values differ by units."""
    weights = normal_like(network.abstract_params(), seed, 0.16)
    return jax.tree.map(lambda x: x + 1 if x.ndim == 1 else x, weights)


def init_head(head, width, copies, seed):
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), width, copies))
    return normal_like(shapes, seed, 0.5)


@functools.cache
def whole_pass(network):
    want = (network.config.head, "hidden", *range(network.config.num_layers + 1))
    forward = functools.partial(network.forward, want=want)
    return jax.jit(forward)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Answers behind their prompts, `[n, length]`, padded on the right."""

    tokens: np.ndarray
    mask: np.ndarray
    prompt_lengths: np.ndarray

    @classmethod
    def of(cls, prompts, prompt_mask, answers):
        """All `answers`, `[P, M]`, one prompt after the other."""
        counts = prompt_mask.sum(axis=-1)
        rows = [
            np.concatenate([prompts[p, prompt_mask[p]], answers.tokens[p, m, :length]])
            for (p, m), length in np.ndenumerate(answers.lengths)
        ]
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(prompt_mask.shape[1] + CAPACITY) < lengths[:, None]
        tokens = np.zeros(mask.shape, np.int32)
        tokens[mask] = np.concatenate(rows)
        return cls(tokens, mask, np.repeat(counts, answers.lengths.shape[1]))

    @property
    def in_answer(self):
        return self.mask & (np.arange(self.mask.shape[1]) >= self.prompt_lengths[:, None])

    def outputs(self, network, params, want):
        outputs = whole_pass(network)(params, self.tokens, self.mask)
        return np.asarray(
            outputs.layers[want] if want in outputs.layers else getattr(outputs, want)
        )

    def log_probs(self, network, params):
        """Of the answers' tokens, zero elsewhere."""
        logits = self.outputs(network, params, "logits")[:, :-1]
        logits = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(logits, self.tokens[:, 1:, None], axis=-1)[..., 0]
        return np.where(self.in_answer, np.pad(chosen, ((0, 0), (1, 0))), 0.0)


@dataclasses.dataclass(frozen=True)
class Guide:
    """A scorer with its parameters, and V_t of every prefix of whole sequences.

    `values` maps `Sequences` to `[n, length, T]`.
    """

    scorer: Scorer
    params: Any
    betas: np.ndarray
    values: Callable[[Sequences], np.ndarray]


def apply_head(head, params, copy, features):
    """One copy of a head, in numpy."""
    x = features
    for number, layer in enumerate(params):
        x = x / (1 + np.exp(-x)) if number else x
        x = x @ np.asarray(layer["kernel"][copy]) + np.asarray(layer["bias"][copy])
    return 1 / (1 + np.exp(-x)) if head.output == "sigmoid" else x


def value_sum(networks, params, values):
    networks = tuple(networks)
    betas = np.linspace(0.5, 3.0, sum(network.num_values for network in networks))
    scorer_params = ValueSumParams(tuple(params), jnp.asarray(betas, jnp.float32))
    return Guide(ValueSum(networks), scorer_params, betas, values)


def separate_networks():
    networks = [tiny_network(head="score"), tiny_network(head="score", **OTHER_SIZES)]
    weights = [init(network, seed) for seed, network in enumerate(networks, 1)]

    def values(sequences):
        pairs = zip(networks, weights, strict=True)
        return np.stack([sequences.outputs(*pair, "score") for pair in pairs], axis=-1)

    return value_sum(map(ValueNetwork, networks), map(ValueParams, weights), values)


def heads_on_one_backbone():
    network = tiny_network()
    weights = init(network, 1)
    linear = ValueNetwork(network, Head(output="sigmoid"), num_values=2)
    middle = ValueNetwork(network, Head((8, 5)), layer=1, num_values=3)
    heads = [init_head(linear.head, 16, 2, 1), init_head(middle.head, 16, 3, 2)]

    def values(sequences):
        final = sequences.outputs(network, weights, "hidden")
        inner = sequences.outputs(network, weights, 1)
        each = [apply_head(linear.head, heads[0], copy, final) for copy in range(2)]
        each += [apply_head(middle.head, heads[1], copy, inner) for copy in range(3)]
        return np.concatenate(each, axis=-1)

    return value_sum([linear, middle], [ValueParams(weights, head) for head in heads], values)


def merge_adapter(weights, adapters, copy):
    """Weights with one copy of the adapters added to their kernels."""
    rooms = {"qkv": "attention", "output": "attention", "up": "mlp", "down": "mlp"}
    changes = {
        ("layers", number, rooms[target], target, "kernel"): of_target.down @ of_target.up
        for number, of_layer in enumerate(adapters)
        for target, of_target in of_layer.items()
    }

    def merge(path, kernel):
        change = changes.pop(tuple(key.key for key in path if hasattr(key, "key")), None)
        return kernel if change is None else kernel + change[copy].reshape(kernel.shape)

    merged = jax.tree_util.tree_map_with_path(merge, weights)
    assert not changes
    return merged


def adapted_copies():
    """A head for each copy on the middle layer of one network; one score head on another."""
    middle = ValueNetwork(tiny_network(), Head((8,)), layer=1, num_values=3, adapters=True)
    scoring = ValueNetwork(tiny_network(head="score", **OTHER_SIZES), num_values=2, adapters=True)

    def init_value(value, seed):
        config, copies = value.network.config, value.num_values
        shapes = jax.eval_shape(
            lambda: init_adapters(config, jax.random.key(0), copies=copies, rank=3)
        )
        head = value.head and init_head(value.head, config.embed_dim, copies, seed)
        return ValueParams(init(value.network, seed), head, normal_like(shapes, seed, 0.2))

    params = [init_value(middle, 1), init_value(scoring, 2)]

    def values(sequences):
        each = []
        for copy in range(3):
            weights = merge_adapter(params[0].backbone, params[0].adapters, copy)
            features = sequences.outputs(middle.network, weights, 1)
            each.append(apply_head(middle.head, params[0].head, copy, features))
        for copy in range(2):
            weights = merge_adapter(params[1].backbone, params[1].adapters, copy)
            each.append(sequences.outputs(scoring.network, weights, "score")[..., None])
        return np.concatenate(each, axis=-1)

    return value_sum([middle, scoring], params, values)


def policy_heads():
    heads, layers, copies = (Head(), Head((8,)), Head()), ("hidden", 1, 0), (2, 1, 1)
    params = tuple(
        init_head(head, 16, count, seed)
        for seed, (head, count) in enumerate(zip(heads, copies, strict=True))
    )
    betas = np.array([1.0, 2.0, 0.5, 4.0])

    def values(sequences):
        weights = init(POLICY, 0)
        each = [
            apply_head(head, of_head, copy, sequences.outputs(POLICY, weights, layer))
            for head, of_head, layer, count in zip(heads, params, layers, copies, strict=True)
            for copy in range(count)
        ]
        return np.concatenate(each, axis=-1)

    scorer_params = PolicyHeadsParams(params, jnp.asarray(betas, jnp.float32))
    return Guide(PolicyHeads(heads, layers), scorer_params, betas, values)


def log_ratio():
    tuned, untuned = tiny_network(), tiny_network(**OTHER_SIZES)
    weights = init(tuned, 1), init(untuned, 2)

    def values(sequences):
        gain = sequences.log_probs(tuned, weights[0])
        loss = sequences.log_probs(untuned, weights[1])
        return np.cumsum(gain - loss, axis=-1)[..., None]

    return Guide(LogRatio(tuned, untuned), LogRatioParams(*weights), np.ones(1), values)


def competitors(output):
    """The node of every competitor of every step, -1 where there is none, `[S, P, U]`."""
    trace = output.trace
    steps, prompts, width, successors = trace.new.shape
    finished = np.moveaxis(trace.finished, 0, 1).reshape(prompts, -1)
    own = np.arange(width * successors).reshape(width, successors)
    nodes = np.full(trace.new.shape, -1)
    beams = np.full((prompts, width), -1)
    for step in range(output.num_steps.max()):
        done = (beams >= 0) & np.take_along_axis(finished, beams, axis=1)
        nodes[step, ..., 0] = np.where(done, beams, -1)
        new = trace.new[step]
        nodes[step][new] = (step * width * successors + np.broadcast_to(own, new.shape))[new]
        nodes[step, step >= output.num_steps] = -1
        beams = np.take_along_axis(nodes[step].reshape(prompts, -1), trace.selected[step], axis=1)
    return nodes.reshape(steps, prompts, -1)


SCORERS = [
    (separate_networks, True),
    (heads_on_one_backbone, True),
    (heads_on_one_backbone, False),
    (adapted_copies, True),
    (policy_heads, True),
    (policy_heads, False),
    (log_ratio, True),
    (log_ratio, False),
]


@pytest.mark.parametrize(
    ("make_guide", "reuse_finished"),
    SCORERS,
    ids=lambda x: x.__name__ if callable(x) else "reuse" if x else "",
)
def test_scores_are_those_of_whole_prefixes(make_guide, reuse_finished):
    guide = make_guide()
    search = GuidedSearch(
        POLICY,
        guide.scorer,
        eos_ids=(3, 17, 40),
        beam_width=3,
        num_successors=2,
        chunk_length=CHUNK_LENGTH,
        capacity=CAPACITY,
        reuse_finished=reuse_finished,
    )
    params = GuidedParams(init(POLICY, 0), guide.params)
    prompts = np.random.default_rng(0).integers(64, size=(4, 9)).astype(np.int32)
    place = np.arange(9)
    padded_anywhere = [place < 6, place >= 4, place >= 0, (place < 2) | (place > 5)]
    prompt_mask = np.stack(padded_anywhere)
    limits = np.array([23, 20, 23, 13], np.int32)

    @jax.jit
    def run(params, keys):
        output = search(params, keys, prompts, prompt_mask, limits)
        nodes = jnp.arange(MAX_STEPS * 6) * jnp.ones((4, 1), jnp.int32)
        answers = finalists(output.trace, nodes, CAPACITY)
        return output, answers, search.root(params, prompts, prompt_mask).scores

    output, prefixes, root = jax.device_get(run(params, prompt_keys(3, list("abcd"))))
    trace = output.trace
    sequences = Sequences.of(prompts, prompt_mask, prefixes)
    at_every_token = guide.values(sequences)
    num_values = at_every_token.shape[-1]

    def of_nodes(index):
        chosen = at_every_token[np.arange(len(index)), index]
        return chosen.reshape(4, -1, num_values)

    at_last = of_nodes(sequences.mask.sum(axis=-1) - 1)
    nodes = competitors(output)
    expected = np.take_along_axis(at_last[None], nodes[..., None], axis=2)
    competing = nodes >= 0
    parts = trace.scores.parts.reshape(*nodes.shape, num_values)
    totals = trace.scores.total.reshape(nodes.shape)
    close = functools.partial(np.testing.assert_allclose, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(np.isfinite(totals), competing)
    close(parts[competing], expected[competing])
    close(totals[competing], (expected / guide.betas).sum(axis=-1)[competing])
    close(root.parts, of_nodes(sequences.prompt_lengths - 1)[:, 0])
    close(root.total, (root.parts / guide.betas).sum(axis=-1))

    # The policy's memory goes through the same reorderings.
    in_prefix = np.arange(CAPACITY) < prefixes.lengths[..., None]
    log_probs = sequences.log_probs(POLICY, params.policy)
    close(prefixes.log_probs[in_prefix], log_probs[sequences.in_answer])

    # All that could go wrong happened.
    assert output.num_steps.max() == MAX_STEPS
    reordered = trace.selected // 2 != np.arange(3)
    assert reordered.any(axis=-1).sum() > 2 * MAX_STEPS
    carried = competing & ~trace.new.reshape(nodes.shape)
    assert carried.sum() > MAX_STEPS
    assert set(trace.chunk_lengths[trace.ended & trace.new]) == {1, 2, 3}
    assert (trace.finished & ~trace.ended).any()
    parents = np.where(trace.new.any(axis=-1), trace.parents, np.arange(-4, -1))[1:]
    doubled = (parents[..., None] == parents[..., None, :]).sum(axis=(-2, -1)) > 3
    assert doubled.any() == reuse_finished
