"""Tokens drawn from logits that lie in parts are those drawn from all of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models import Sampling, draw, make_mesh
from iro_jax.models.sampling import top_tokens

VOCABULARY = 512
SAMPLINGS = [
    Sampling(0),
    Sampling(1.0),
    Sampling(0.7, top_k=50),
    Sampling(0.7, top_k=64),
    Sampling(0.6, top_k=50, top_p=0.9),
    Sampling(1.3, top_p=0.8),
    Sampling(0.9, top_k=VOCABULARY),
]


def some_logits(rows=(4, 6)):
    keys = jax.random.split(jax.random.key(1), rows)
    logits = 3 * jax.random.normal(jax.random.key(0), (*rows, VOCABULARY))
    # Equal logits in different parts, and the largest ones among them.
    return keys, jnp.round(logits, 1)


@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_draw_does_not_depend_on_how_the_vocabulary_is_split(sampling, shape):
    keys, logits = some_logits()
    alone = draw(keys, logits, sampling)
    with jax.set_mesh(make_mesh(*shape)):
        spread = jax.jit(lambda k, x: draw(k, x, sampling))(keys, logits)
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    np.testing.assert_allclose(alone.log_probs, spread.log_probs, atol=2e-6)
    np.testing.assert_allclose(alone.warped_log_probs, spread.warped_log_probs, atol=2e-6)


def test_the_most_likely_tokens_of_all_parts():
    _, logits = some_logits()
    log_probs, ids = top_tokens(logits, 20)
    expected = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), 20)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_allclose(log_probs, expected[0], atol=2e-6)
    with jax.set_mesh(make_mesh(1, 8)):
        spread = jax.jit(lambda x: top_tokens(x, 20))(logits)
    np.testing.assert_array_equal(ids, spread[1])
    np.testing.assert_allclose(log_probs, spread[0], atol=2e-6)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_no_device_gets_all_logits(sampling):
    keys, logits = some_logits((16, 16))
    mesh = make_mesh(1, 8)
    with jax.set_mesh(mesh):
        places = jax.NamedSharding(mesh, jax.P(None, None, "model"))
        fn = jax.jit(lambda k, x: draw(k, x, sampling), in_shardings=(None, places))
        program = fn.lower(keys, logits).compile().as_text()
    gathered = re.findall(r"= \(?(\w+)\[([\d,]+)\]\S* all-gather", program)
    # No more than each part's k most likely ones.
    k = min(sampling.top_k or 1, VOCABULARY // 8) if sampling.top_k != VOCABULARY else 1
    for _, dimensions in gathered:
        assert np.prod([int(size) for size in dimensions.split(",")]) <= 16 * 16 * 8 * k
