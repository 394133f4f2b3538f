"""Prefill and decode on a 2x4 mesh of virtual devices give what one device gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from iro_jax.models import Sampling, generate, make_mesh, prompt_keys
from iro_jax.models.sharding import partition_spec, spread_batch
from iro_jax.testing import tiny_network

NETWORKS = {
    "divisible heads": tiny_network(num_heads=8, num_kv_heads=4),
    "fewer key heads than devices": tiny_network(),
    "odd vocabulary and MLP": tiny_network(vocab_size=61, mlp_dim=30, tied_embeddings=True),
    "score": tiny_network(num_heads=8, num_kv_heads=4, head="score"),
}
MESHES = [(8, 1), (1, 8), (4, 2)]


def run(network, mesh=None):
    """Prefill, three decode steps and a commit; on the mesh if there is one."""
    params = network.init(jax.random.key(0))
    prefill, decode = jax.jit(network.prefill), jax.jit(network.decode)
    cache = network.empty_cache(
        num_prompts=8,
        prompt_slots=12,
        beam_width=2,
        beam_slots=8,
        num_successors=2,
        chunk_length=4,
    )
    rng = np.random.default_rng(0)
    vocabulary = network.config.vocab_size
    tokens = rng.integers(0, vocabulary, (8, 12)).astype(np.int32)
    mask = np.arange(12)[None] < rng.integers(1, 13, (8, 1))
    new = rng.integers(0, vocabulary, (8, 2, 2, 3)).astype(np.int32)
    if mesh is not None:
        params = jax.device_put(params, network.param_shardings(mesh))
        cache = jax.device_put(cache, cache.shardings(mesh))
        tokens, mask, new = jax.device_put((tokens, mask, new), jax.NamedSharding(mesh, P("data")))
    first, cache = prefill(params, cache, tokens, mask)
    found = [first]
    for step in range(3):
        out, cache = decode(params, cache, new[..., step : step + 1])
        found.append(out)
        if step == 1:
            cache = jax.jit(type(cache).commit)(cache, jnp.tile(jnp.array([3, 0]), (8, 1)))
    return found, cache, params


CASES = [(name, (2, 4)) for name in NETWORKS] + [("divisible heads", shape) for shape in MESHES]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_a_mesh_computes_what_one_device_computes(name, shape):
    network = NETWORKS[name]
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        spread, cache, params = run(network, mesh)
    alone, _, _ = run(network)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), alone, spread)

    if name == "divisible heads":
        kernel = params["layers"][0]["attention"]["qkv"]["kernel"].get_value()
        split = shape[1] > 1 and 4 % shape[1] == 0
        assert kernel.sharding.spec == P(None, "model" if split else None, None, None)
        keys = cache.chunk.keys[0]
        prompts, _, _, heads, _, _ = keys.sharding.shard_shape(keys.shape)
        assert prompts == 8 // shape[0]
        assert heads == (4 // shape[1] if split else 4)


def test_sampling_does_not_depend_on_the_mesh():
    network = tiny_network(num_heads=8, num_kv_heads=4)
    params = network.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    sample = functools.partial(
        generate, network, sampling=Sampling(), eos_ids=(3,), max_new_tokens=16, num_samples=4
    )
    keys = prompt_keys(0, [str(i) for i in range(8)])
    alone = jax.jit(sample)(params, keys, tokens, mask)
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, network.param_shardings(mesh))
        spread = jax.jit(sample)(params, keys, tokens, mask)
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    assert alone.finished.any()
    assert not alone.finished.all()


def test_axes_that_do_not_divide_are_replicated():
    mesh = make_mesh(2, 4)
    assert partition_spec(("vocab", None), (64, 16), mesh) == P("model", None)
    assert partition_spec(("vocab", None), (62, 16), mesh) == P(None, None)
    assert partition_spec(("batch", "nobody"), (4, 4), mesh) == P("data", None)
    with pytest.raises(ValueError, match=r"strict|longer|shorter"):
        partition_spec(("batch",), (4, 4), mesh)


def test_without_a_mesh_nothing_is_pinned():
    x = jnp.ones((2, 3))
    assert spread_batch(x) is x


def test_networks_run_inside_shard_map():
    """Each device reads its own prompts with replicated weights."""
    network = tiny_network()
    params = network.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mesh = make_mesh(8, 1)
    read = jax.shard_map(
        lambda p, t, m: network.forward(p, t, m).logits,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P("data"),
    )
    got = jax.jit(read)(params, tokens, mask)
    want = network.forward(params, tokens, mask).logits
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_too_small_a_machine():
    with pytest.raises(ValueError, match=r"needs 16 devices\. Got: 8"):
        make_mesh(4, 4)


@pytest.mark.slow
def test_weights_load_straight_into_shards(tmp_path):
    from iro_jax.models import from_pretrained
    from tests.models.references import VARIANTS

    VARIANTS[0].causal(num_key_value_heads=4, vocab_size=104).save_pretrained(tmp_path / "model")
    alone = from_pretrained(tmp_path / "model")
    mesh = make_mesh(2, 4)
    spread = from_pretrained(tmp_path / "model", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)
    expected = spread.network.param_shardings(mesh)
    jax.tree.map(
        lambda array, sharding: np.testing.assert_equal(array.sharding, sharding),
        spread.params,
        expected,
    )
    assert not spread.params["embedding"].get_value().is_fully_replicated
