"""What the compiled decode program contains: no copy of a cache, no call to the host."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from iro_jax.testing import tiny_network

SHAPES = {
    "search": (3, 4, 4, 2),
    "one prompt": (1, 4, 4, 2),
    "one beam": (3, 1, 4, 2),
    "one successor": (3, 4, 1, 2),
    "one key head": (3, 4, 4, 1),
    "one of everything": (1, 1, 1, 1),
}


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


@pytest.fixture(scope="module", params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(scope="module", params=[one_step, whole_chunk], ids=lambda f: f.__name__)
def program(request, shape):
    """The optimised program with the cache donated, and the cache's shapes."""
    num_prompts, beam_width, num_successors, kv_heads = shape
    network = tiny_network(num_kv_heads=kv_heads)
    cache = jax.eval_shape(
        lambda: network.empty_cache(
            num_prompts=num_prompts,
            prompt_slots=32,
            beam_width=beam_width,
            beam_slots=48,
            num_successors=num_successors,
            chunk_length=16,
        )
    )
    tokens = jax.ShapeDtypeStruct((*shape[:3], 1), jnp.int32)
    jitted = jax.jit(request.param(network), donate_argnums=1)
    return jitted.lower(network.abstract_params(), cache, tokens).compile(), cache


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
