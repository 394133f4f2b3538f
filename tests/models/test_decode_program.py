"""What the compiled decode program contains: no copy of a cache, no call to the host."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from iro_jax.testing import tiny_network

SIZES = {
    "num_prompts": 3,
    "prompt_slots": 32,
    "beam_width": 4,
    "beam_slots": 48,
    "num_successors": 4,
    "chunk_length": 16,
}
TOKENS = jax.ShapeDtypeStruct((3, 4, 4, 1), jnp.int32)


def one_step(network):
    return lambda params, cache, tokens: network.decode(params, cache, tokens)


def whole_chunk(network):
    def chunk(params, cache, tokens):
        def step(_, state):
            cache, tokens = state
            outputs, cache = network.decode(params, cache, tokens)
            return cache, jnp.argmax(outputs.logits, axis=-1).astype(jnp.int32)

        return lax.fori_loop(0, 16, step, (cache, tokens))

    return chunk


@pytest.fixture(scope="module", params=[one_step, whole_chunk], ids=lambda f: f.__name__)
def program(request):
    """The optimised program with the cache donated, and the cache's shapes."""
    network = tiny_network()
    cache = jax.eval_shape(lambda: network.empty_cache(**SIZES))
    jitted = jax.jit(request.param(network), donate_argnums=1)
    return jitted.lower(network.abstract_params(), cache, TOKENS).compile(), cache


def test_no_cache_is_copied(program):
    compiled, cache = program
    text = compiled.as_text()
    for part in (cache.prompt, cache.beams, cache.chunk):
        shape = ",".join(map(str, part.keys[0].shape))
        assert f"f32[{shape}]" in text
        assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", text)


def test_the_cache_is_updated_in_place(program):
    compiled, cache = program
    memory = compiled.memory_analysis()
    chunk_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.chunk))
    assert memory.alias_size_in_bytes >= chunk_bytes


def test_the_host_is_not_called(program):
    text = program[0].as_text()
    for word in ("callback", "infeed", "outfeed", " send(", " recv("):
        assert word not in text
