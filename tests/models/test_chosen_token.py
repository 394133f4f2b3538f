"""Outputs at one of several new tokens are those of computing all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models import Layer, Rope
from iro_jax.testing import tiny_network

ROPE = Rope(10000.0, 4)
KINDS = {
    "plain": {},
    "a window": {"layers": (Layer(ROPE), Layer(ROPE, window=3))},
    "parallel": {"parallel_residual": True},
    "norms behind": {"post_norms": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_decoding(kind):
    network = tiny_network(**KINDS[kind])
    depth = network.config.num_layers
    want = ("logits", "hidden", *range(depth + 1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), network.abstract_params()
    )
    cache = network.empty_cache(
        num_prompts=2, prompt_slots=6, beam_width=2, num_successors=3, chunk_length=4, beam_slots=4
    )
    prompt_mask = np.arange(6) < np.array([[6], [4]])
    prompts = rng.integers(0, 64, (2, 6), np.int32)
    prefill = jax.jit(network.prefill, static_argnames=("want", "every_position"))
    everywhere, _ = prefill(params, cache, prompts, prompt_mask, want=want, every_position=True)
    at_last, cache = prefill(params, cache, prompts, prompt_mask, want=want)
    for whole, one in zip(*map(jax.tree.leaves, (everywhere, at_last)), strict=True):
        np.testing.assert_allclose(one, whole[np.arange(2), [5, 3]], atol=1e-5)

    tokens = rng.integers(0, 64, (2, 2, 3, 4), np.int32)
    at = rng.integers(0, 4, (2, 2, 3))
    mask = np.arange(4) <= at[..., None]
    decode = jax.jit(network.decode, static_argnames="want")
    everywhere, full = decode(params, cache, tokens, mask, want=want)
    chosen, filled = decode(params, cache, tokens, mask, want=want, at=jnp.asarray(at))
    assert list(chosen.layers) == list(range(depth + 1))
    for whole, one in zip(*map(jax.tree.leaves, (everywhere, chosen)), strict=True):
        index = at.reshape(*at.shape, *(1,) * (whole.ndim - 3))
        np.testing.assert_allclose(one, np.take_along_axis(whole, index, 3)[:, :, :, 0], atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (full, filled)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
