"""Guided search of networks against a search in PyTorch, and its scores against whole prefixes.

The search of `torch_search` has no caches and shares no code with the library; handed the same
noise it must take the same tokens, parents and answers. And however beams are reordered, what a
scorer computes from a chunk and its memory is what a pass over the whole prefix gives.
Letters: P prompts, K beams, U candidates, S steps, V vocabulary, T value functions.
"""

import dataclasses
import functools
from collections.abc import Callable

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

jitted = functools.cache(jax.jit)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The tiny networks: every scorer against a pass over whole prefixes.

CHUNK_LENGTH, CAPACITY = 3, 23
EOS_IDS = (3, 17, 40)
POLICY = tiny_network()
OTHER = {
    "embed_dim": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "layers": (Layer(Rope(10000.0, 8), window=6), *(Layer(Rope(10000.0, 8)),) * 2),
}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Answers behind their prompts, padded on the right; `starts` are the prompts' lengths."""

    tokens: np.ndarray
    mask: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, prompts, prompt_mask, answers):
        """All `answers`, `[P, M]`, row by row."""
        prompts = [row[real] for row, real in zip(prompts, prompt_mask, strict=True)]
        rows = [
            [*prompt, *answers.tokens[p, m, : answers.lengths[p, m]]]
            for p, prompt in enumerate(prompts)
            for m in range(answers.tokens.shape[1])
        ]
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(prompt_mask.shape[1] + CAPACITY) < lengths[:, None]
        tokens = np.zeros(mask.shape, np.int32)
        tokens[mask] = np.concatenate(rows)
        starts = np.repeat([len(prompt) for prompt in prompts], answers.tokens.shape[1])
        return cls(tokens, mask, starts)

    def outputs(self, network, params, want):
        forward = jitted(functools.partial(network.forward, want=(want,)))
        outputs = forward(params, self.tokens, self.mask)
        return np.asarray(
            outputs.layers[want] if want in outputs.layers else getattr(outputs, want)
        )

    def log_probs(self, network, params):
        """Of the answers' tokens, zero elsewhere, `[n, length]`."""
        logits = self.outputs(network, params, "logits")[:, :-1]
        chosen = np.take_along_axis(jax.nn.log_softmax(logits), self.tokens[:, 1:, None], -1)
        place = np.arange(self.tokens.shape[1])
        answer = self.mask & (place >= self.starts[:, None])
        return np.where(answer, np.pad(chosen[..., 0], ((0, 0), (1, 0))), 0.0)


@dataclasses.dataclass(frozen=True)
class Guide:
    """A scorer with parameters, and what each V_t of whole sequences is, `[n, length, T]`."""

    scorer: Scorer
    params: object
    betas: np.ndarray
    values: Callable[[Sequences], np.ndarray]


def init(network, seed):
    """Weights large enough that logits and values differ by units."""
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, network.init(jax.random.key(seed)))


def init_head(head, width, copies, seed):
    params = head.init(jax.random.key(seed), width, copies)
    return jax.tree.map(lambda x: x + 0.5 * normal(seed, *x.shape), params)


def apply_heads(head, params, features):
    """The arithmetic of `Head` in numpy, head by head: `[n, length, T]`."""
    values = []
    for copy in range(params[0]["kernel"].shape[0]):
        x = features
        for number, layer in enumerate(params):
            x = x / (1 + np.exp(-x)) if number else x
            x = x @ np.asarray(layer["kernel"][copy]) + np.asarray(layer["bias"][copy])
        values.append(1 / (1 + np.exp(-x)) if head.output == "sigmoid" else x)
    return np.concatenate(values, axis=-1)


def separate_networks():
    networks = [tiny_network(head="score"), tiny_network(head="score", **OTHER)]
    weights = [init(network, seed) for seed, network in enumerate(networks, 1)]
    betas = np.array([1.0, 2.5], np.float32)

    def values(sequences):
        scores = [
            sequences.outputs(network, params, "score")
            for network, params in zip(networks, weights, strict=True)
        ]
        return np.stack(scores, axis=-1)

    return Guide(
        ValueSum(tuple(map(ValueNetwork, networks))),
        ValueSumParams(tuple(map(ValueParams, weights)), jnp.asarray(betas)),
        betas,
        values,
    )


def shared_backbone():
    network = tiny_network()
    weights = init(network, 1)
    groups = [
        (ValueNetwork(network, Head(), num_values=2), "hidden"),
        (ValueNetwork(network, Head((8, 5)), layer=1, num_values=3), 1),
        (ValueNetwork(network, Head(output="sigmoid"), layer=2), 2),
    ]
    heads = [init_head(v.head, 16, v.num_values, seed) for seed, (v, _) in enumerate(groups)]
    betas = np.array([1.0, 2.0, 0.5, 1.5, 3.0, 1.0], np.float32)

    def values(sequences):
        return np.concatenate(
            [
                apply_heads(value.head, head, sequences.outputs(network, weights, layer))
                for (value, layer), head in zip(groups, heads, strict=True)
            ],
            axis=-1,
        )

    return Guide(
        ValueSum(tuple(value for value, _ in groups)),
        ValueSumParams(tuple(ValueParams(weights, head) for head in heads), jnp.asarray(betas)),
        betas,
        values,
    )


def merge_adapter(weights, adapters, copy):
    """The network whose kernels have one adapter added to them."""
    places = {
        "qkv": ("attention", "qkv"),
        "output": ("attention", "output"),
        "up": ("mlp", "up"),
        "down": ("mlp", "down"),
    }
    changes = {
        ("layers", number, *places[target], "kernel"): adapter.down[copy] @ adapter.up[copy]
        for number, of_layer in enumerate(adapters)
        for target, adapter in of_layer.items()
    }

    def merge(path, kernel):
        names = tuple(getattr(key, "key", None) for key in path)
        names = tuple(name for name in names if name is not None)
        return kernel + changes.pop(names).reshape(kernel.shape) if names in changes else kernel

    merged = jax.tree_util.tree_map_with_path(merge, weights)
    assert not changes
    return merged


def adapted_copies():
    """Heads of their own on the last and on a middle layer, and one score head for all."""
    network, scoring = tiny_network(), tiny_network(head="score", **OTHER)
    groups = [
        (ValueNetwork(network, Head(), num_values=2, adapters=True), "hidden"),
        (ValueNetwork(network, Head((8,)), layer=1, num_values=2, adapters=True), 1),
        (ValueNetwork(scoring, num_values=2, adapters=True), "score"),
    ]
    params = []
    for seed, (value, _) in enumerate(groups):
        config = value.network.config
        adapters = init_adapters(config, jax.random.key(seed), copies=2, rank=3)
        adapters = jax.tree.map(lambda x: x + 0.2 * normal(7, *x.shape), adapters)
        head = value.head and init_head(value.head, config.embed_dim, 2, seed)
        params.append(ValueParams(init(value.network, seed), head, adapters))
    betas = np.array([1.0, 2.0, 0.5, 1.5, 1.0, 3.0], np.float32)

    def value_of_copy(value, layer, of_value, copy, sequences):
        weights = merge_adapter(of_value.backbone, of_value.adapters, copy)
        features = sequences.outputs(value.network, weights, layer)
        if value.head is None:
            return features[..., None]
        return apply_heads(
            value.head, jax.tree.map(lambda x: x[copy : copy + 1], of_value.head), features
        )

    def values(sequences):
        each = [
            value_of_copy(value, layer, of_value, copy, sequences)
            for (value, layer), of_value in zip(groups, params, strict=True)
            for copy in range(2)
        ]
        return np.concatenate(each, axis=-1)

    return Guide(
        ValueSum(tuple(value for value, _ in groups)),
        ValueSumParams(tuple(params), jnp.asarray(betas)),
        betas,
        values,
    )


def policy_heads():
    heads, layers = (Head(), Head((8,)), Head()), ("hidden", 1, 0)
    params = tuple(
        init_head(head, 16, copies, copies) for head, copies in zip(heads, (2, 1, 1), strict=True)
    )
    betas = np.array([1.0, 2.0, 0.5, 4.0], np.float32)

    def values(sequences):
        return np.concatenate(
            [
                apply_heads(head, of_head, sequences.outputs(POLICY, init(POLICY, 0), layer))
                for head, layer, of_head in zip(heads, layers, params, strict=True)
            ],
            axis=-1,
        )

    return Guide(
        PolicyHeads(heads, layers), PolicyHeadsParams(params, jnp.asarray(betas)), betas, values
    )


def log_ratio():
    tuned, untuned = tiny_network(), tiny_network(**OTHER)
    weights = init(tuned, 1), init(untuned, 2)

    def values(sequences):
        gain = sequences.log_probs(tuned, weights[0])
        loss = sequences.log_probs(untuned, weights[1])
        return np.cumsum(gain - loss, axis=-1)[..., None]

    return Guide(LogRatio(tuned, untuned), LogRatioParams(*weights), np.ones(1), values)


GUIDES = [separate_networks, shared_backbone, adapted_copies, policy_heads, log_ratio]


def tiny_prompts():
    """Prompts padded on the right, on the left, not at all, and in the middle."""
    tokens = np.random.default_rng(0).integers(64, size=(4, 9)).astype(np.int32)
    place = np.arange(9)
    return tokens, np.stack([place < 6, place >= 4, place >= 0, (place < 2) | (place > 5)])


def competitors(output):
    """The node of every competitor of every step, -1 where there is none, `[S, P, U]`."""
    new, selected = output.trace.new, output.trace.selected
    steps, prompts, width, successors = new.shape
    beams = np.full((prompts, width), -1)
    nodes = np.full(new.shape, -1)
    for step in range(output.num_steps.max()):
        made = step * width * successors + np.arange(width * successors).reshape(width, -1)
        carried = np.where(np.arange(successors) == 0, beams[..., None], -1)
        finished = (beams >= 0) & np.take_along_axis(
            np.moveaxis(output.trace.finished, 0, 1).reshape(prompts, -1), beams, axis=1
        )
        nodes[step] = np.where(new[step], made, np.where(finished[..., None], carried, -1))
        beams = np.take_along_axis(nodes[step].reshape(prompts, -1), selected[step], axis=1)
    return nodes.reshape(steps, prompts, -1)


@pytest.mark.parametrize("reuse_finished", [False, True], ids=["", "reuse"])
@pytest.mark.parametrize("make_guide", GUIDES, ids=lambda make: make.__name__)
def test_scores_are_those_of_whole_prefixes(make_guide, reuse_finished):
    guide = make_guide()
    search = GuidedSearch(
        POLICY,
        guide.scorer,
        eos_ids=EOS_IDS,
        beam_width=3,
        num_successors=2,
        chunk_length=CHUNK_LENGTH,
        capacity=CAPACITY,
        reuse_finished=reuse_finished,
    )
    params = GuidedParams(init(POLICY, 0), guide.params)
    tokens, mask = tiny_prompts()
    limits = np.array([23, 20, 23, 13], np.int32)
    keys = prompt_keys(1, list("abcd"))
    output = jax.device_get(jax.jit(search)(params, keys, tokens, mask, limits))
    root = jax.jit(search.root)(params, tokens, mask)

    trace = output.trace
    nodes = competitors(output)
    here = nodes >= 0
    parts = trace.scores.parts.reshape(*nodes.shape, -1)
    totals = trace.scores.total.reshape(nodes.shape)
    np.testing.assert_array_equal(totals > -np.inf, here)

    prefixes = finalists(trace, jnp.asarray(np.concatenate(nodes, axis=-1)), CAPACITY)
    prefixes = jax.device_get(prefixes)
    sequences = Sequences.of(tokens, mask, prefixes)
    values = guide.values(sequences)
    last = np.maximum(sequences.mask.sum(axis=-1) - 1, 0)
    whole = values[np.arange(len(last)), last].reshape(4, 8, -1, parts.shape[-1]).swapaxes(0, 1)
    np.testing.assert_allclose(parts[here], whole[here], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(
        totals[here], (whole / guide.betas).sum(axis=-1)[here], atol=TOLERANCE, rtol=0
    )

    # The bare prompts'.
    at_start = values[np.arange(len(last)), sequences.starts - 1].reshape(4, -1, parts.shape[-1])
    np.testing.assert_allclose(root.scores.parts, at_start[:, 0], atol=TOLERANCE, rtol=0)

    # The policy's own memory goes through the same reorderings.
    log_probs = sequences.log_probs(POLICY, params.policy)[sequences.mask]
    print(log_probs.shape)

    # All of this is about searches in which much happens.
    assert output.num_steps.max() == 8
    rows = trace.selected // 2
    assert (rows != np.arange(3)).any(axis=-1).sum() > 8
    assert (here & ~trace.new.reshape(nodes.shape)).any()
    ended = trace.ended & trace.new
    assert len(np.unique(trace.chunk_lengths[ended])) == CHUNK_LENGTH
