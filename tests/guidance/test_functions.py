"""However value functions are put together, a search sums the same V_t / beta_t."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from iro_jax.guidance import (
    BridgedValues,
    GuidedSearch,
    PolicyHeads,
    ValueSum,
    function_scorer,
    reads_policy,
    watching,
)
from iro_jax.guidance.scorers import Sizes
from iro_jax.models import Pretrained, prompt_keys
from iro_jax.testing import tiny_network, word_tokenizer
from iro_jax.values import (
    Head,
    RecomputedNetwork,
    ValueFunction,
    ValueNetwork,
    ValueParams,
    new_head,
    with_adapters,
)
from tests.guidance.cases import (
    EOS,
    POLICY,
    SIZES,
    batch,
    guided,
    guided_params,
    prompts,
    scored,
    weights,
)

WORDS = [f"w{i}" for i in range(55)]
TOKENIZER = word_tokenizer(WORDS)
BETAS = (1.0, 2.0, 0.5, 4.0)


def pretrained(network=POLICY, *, seed=0, tokenizer=TOKENIZER) -> Pretrained:
    return Pretrained(network, weights(network, seed), tokenizer, EOS, {}, Path("tiny"))


MODEL = pretrained()


def head(model, kind, *, layer=None, seed=0):
    """A head whose values are large enough to steer."""
    function = new_head(model, kind, layer=layer, seed=seed)
    large = jax.tree.map(lambda x: 10 * x, function.params.head)
    return function.with_params(dataclasses.replace(function.params, head=large))


def adapted(function, seed):
    function = with_adapters(function, rank=2, seed=seed)
    adapters = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape),
        function.params.adapters,
    )
    return function.with_params(dataclasses.replace(function.params, adapters=adapters))


def score_function(seed):
    model = pretrained(tiny_network(head="score"), seed=seed)
    return ValueFunction(model, ValueNetwork(model.network), ValueParams(model.params))


def elsewhere(function: ValueFunction) -> ValueFunction:
    """The same function on a copy of its backbone."""
    copy = jax.tree.map(lambda x: x + 0, function.params.backbone)
    return dataclasses.replace(
        function,
        model=dataclasses.replace(function.model, params=copy),
        params=dataclasses.replace(function.params, backbone=copy),
    )


def whole(function, tokens):
    """V of one text, by a pass over it alone."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(tokens)] = tokens
    mask = np.arange(64)[None] < len(tokens)
    values = FORWARD(function.network, function.params, row, mask)
    return float(values[0, len(tokens) - 1, 0])


FORWARD = jax.jit(lambda network, *args: network.forward(*args), static_argnums=0)


def check(scores, place, functions, betas, text):
    """At a place are the values of the text, V by V in their order, and their sum."""
    want = [whole(function, text) for function in functions]
    np.testing.assert_allclose(scores.parts[place], want, atol=1e-4, rtol=1e-4)
    total = sum(v / beta for v, beta in zip(want, betas, strict=True))
    np.testing.assert_allclose(scores.total[place], total, atol=1e-4, rtol=1e-4)


def check_networks(functions, betas):
    """The scores of two prompts, and of two chunks of different lengths after each."""
    scorer, params, tokenizer = function_scorer(MODEL, functions, betas, chunk_length=4)
    assert tokenizer is None
    assert isinstance(scorer, ValueSum)
    asked = prompts(2)
    tokens, mask = batch(asked)
    chunks = np.random.default_rng(1).integers(4, 64, (2, 1, 2, 4)).astype(np.int32)
    inside = np.arange(4) < np.array([[2, 4], [1, 3]])[:, None, :, None]

    @jax.jit
    def read(params):
        before, memory = scorer.root(params, tokens, mask, (), Sizes(1, 2, 4, 1))
        after, _ = scorer.extend(params, chunks, inside, memory)
        return before, after

    before, after = jax.device_get(read(guided_params(params)))
    for row, prompt in enumerate(asked):
        check(before, row, functions, betas, prompt)
        for i in range(2):
            text = np.concatenate([prompt, chunks[row, 0, i][inside[row, 0, i]]])
            check(after, (row, 0, i), functions, betas, text)
    return scorer


MIXED = [
    head(MODEL, Head((8,)), layer=1, seed=0),
    head(MODEL, Head(), seed=1),
    head(MODEL, Head((8,), output="sigmoid"), layer=1, seed=2),
    head(MODEL, Head((8,)), layer=1, seed=3),
]
"""Of three shapes on two layers; the first and the last are alike."""


class TestPolicyHeads:
    def test_heads_on_the_policy_need_no_pass_of_their_own(self):
        scorer, params, tokenizer = function_scorer(MODEL, MIXED, BETAS, chunk_length=4)
        assert isinstance(scorer, PolicyHeads)
        assert tokenizer is None
        search = GuidedSearch(POLICY, scorer, eos_ids=EOS, **SIZES)
        asked = prompts(4)
        root = jax.jit(search.root)(guided_params(params), *batch(asked))
        for row, prompt in enumerate(asked):
            check(root.scores, row, MIXED, BETAS, prompt)

    def test_as_networks_of_their_own_they_score_the_same(self):
        check_networks([elsewhere(function) for function in MIXED], BETAS)

    def test_neighbours_of_one_shape_are_one_group(self):
        some = [MIXED[0], MIXED[3], MIXED[1], MIXED[0]]
        scorer, _, _ = function_scorer(MODEL, some, BETAS)
        assert scorer == PolicyHeads((Head((8,)), Head(), Head((8,))), (1, "hidden", 1))

    def test_what_is_no_head_on_the_policy(self):
        assert reads_policy(MIXED[0], MODEL)
        assert not reads_policy(elsewhere(MIXED[0]), MODEL)
        assert not reads_policy(adapted(MIXED[0], 0), MODEL)
        assert not reads_policy(score_function(0), MODEL)


class TestWatching:
    @pytest.mark.parametrize("kind", ["nothing", "policy heads", "two networks", "log-ratio"])
    def test_it_changes_nothing_and_sees_the_value_of_every_finalist(self, kind):
        scorer, params = scored()[kind]
        asked = prompts(4)
        keys = prompt_keys(0, [str(i) for i in range(len(asked))])

        def run(scorer, params):
            search = jax.jit(guided(scorer))
            return jax.device_get(search(guided_params(params), keys, *batch(asked)))

        alone, watched = run(scorer, params), run(*watching(MODEL, MIXED[0], scorer, params))
        np.testing.assert_array_equal(alone.finalists.tokens, watched.finalists.tokens)
        np.testing.assert_array_equal(alone.ranking, watched.ranking)
        np.testing.assert_allclose(
            alone.finalists.scores.total, watched.finalists.scores.total, atol=1e-4
        )
        parts = watched.finalists.scores.parts
        assert parts.shape[-1] == alone.finalists.scores.parts.shape[-1] + 1
        found = watched.finalists
        for row, entry in np.argwhere(found.valid)[::3]:
            answer = found.tokens[row, entry, : found.lengths[row, entry]]
            want = whole(MIXED[0], np.concatenate([asked[row], answer]))
            np.testing.assert_allclose(parts[row, entry, -1], want, atol=1e-4, rtol=1e-4)

    def test_only_heads_on_the_policy_can_look_on(self):
        with pytest.raises(ValueError, match="own hidden states can look on"):
            watching(MODEL, elsewhere(MIXED[0]))


class TestNetworks:
    def test_neighbours_that_share_a_backbone_read_it_once(self):
        other = pretrained(seed=5)
        functions = [
            MIXED[0],
            head(other, Head((8,)), layer=1, seed=0),
            head(other, Head((8,)), layer=1, seed=1),
            score_function(6),
            adapted(head(MODEL, Head(), layer=1, seed=2), 2),
            adapted(head(MODEL, Head(), layer=1, seed=3), 3),
        ]
        betas = (*BETAS, 3.0, 0.7)
        networks = check_networks(functions, betas).networks
        assert [network.num_values for network in networks] == [1, 2, 1, 2]
        # Blocks above the layer that is read are left out.
        assert [network.network.config.num_layers for network in networks] == [1, 1, 2, 1]

    def test_adapters_of_one_reward_model(self):
        start = score_function(4)
        functions = [adapted(start, 0), adapted(start, 1), start]
        scorer = check_networks(functions, BETAS[:3])
        assert [network.num_values for network in scorer.networks] == [2, 1]

    def test_score_networks_are_read_one_after_the_other(self):
        scorer, _, _ = function_scorer(
            MODEL, [score_function(1), score_function(2), score_function(1)], BETAS[:3]
        )
        assert [network.num_values for network in scorer.networks] == [1, 1, 1]

    @pytest.mark.parametrize("kind", ["score heads", "heads on backbones of their own"])
    def test_stacked_and_recomputed_networks_guide_a_search_as_in_turn(self, kind):
        if kind == "score heads":
            functions = [score_function(seed) for seed in (1, 2, 3)]
        else:
            functions = [
                head(pretrained(seed=seed), Head((8,)), layer=1, seed=seed) for seed in (5, 6, 7)
            ]
        asked = prompts(4)
        keys = prompt_keys(0, [str(i) for i in range(len(asked))])

        def run(**options):
            scorer, params, _ = function_scorer(MODEL, functions, BETAS[:3], **options)
            output = jax.jit(guided(scorer))(guided_params(params), keys, *batch(asked))
            return scorer, jax.device_get(output)

        in_turn, one = run(stacked=False)
        stacked, two = run(stacked=True)
        recomputed, three = run(recomputed=True)
        assert [len(some.networks) for some in (in_turn, stacked, recomputed)] == [3, 1, 3]
        assert all(isinstance(network, RecomputedNetwork) for network in recomputed.networks)
        assert (one.num_steps > 2).any()
        for other in (two, three):
            np.testing.assert_array_equal(one.finalists.tokens, other.finalists.tokens)
            np.testing.assert_array_equal(one.ranking, other.ranking)
            for name in ("total", "parts"):
                found = [getattr(output.finalists.scores, name) for output in (one, other)]
                np.testing.assert_allclose(*found, atol=1e-4, rtol=1e-5)

    def test_another_tokenizer_needs_a_bridge(self):
        other = word_tokenizer([*reversed(WORDS)])
        function = head(pretrained(seed=5, tokenizer=other), Head())
        scorer, _, tokenizer = function_scorer(MODEL, [function], [1.0])
        assert isinstance(scorer, BridgedValues)
        assert tokenizer is other


class TestErrors:
    @pytest.mark.parametrize(
        "betas", [(), (1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))]
    )
    def test_one_positive_beta_for_each(self, betas):
        with pytest.raises(ValueError, match=r"betas must be 2 positive numbers.*Got: "):
            function_scorer(MODEL, MIXED[:2], betas)

    def test_nothing_to_sum(self):
        with pytest.raises(ValueError, match=r"at least one value function. Got: "):
            function_scorer(MODEL, [], [])

    def test_stacked_or_recomputed(self):
        functions = [score_function(1), score_function(2)]
        with pytest.raises(ValueError, match=r"stacked or recomputed. Got: both"):
            function_scorer(MODEL, functions, [1.0, 1.0], stacked=True, recomputed=True)

    def test_one_tokenizer_for_all(self):
        other = pretrained(seed=5, tokenizer=word_tokenizer([*reversed(WORDS)]))
        with pytest.raises(ValueError, match=r"one tokenizer. Got: several"):
            function_scorer(MODEL, [MIXED[0], head(other, Head())], [1.0, 1.0])
