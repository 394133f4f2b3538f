"""Draws follow the exact distribution, and noise belongs to key and token alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from absl.testing import parameterized

from iro_jax.models import Sampling, draw, draw_keys, gumbel_noise, prompt_keys, warp
from iro_jax.models.sampling import top_k

DRAWS = 40_000
LOGITS = np.array([2.0, 1.8, 1.5, 1.5, 0.9, 0.3, 0.0, -0.5, -1.0, -30.0, 1.2], np.float32)

WARPERS = {
    "plain": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top-k": Sampling(top_k=5),
    "top-k larger than the vocabulary": Sampling(top_k=99),
    "top-p": Sampling(top_p=0.8),
    "top-p that keeps one": Sampling(top_p=0.01),
    "all": Sampling(temperature=0.7, top_k=6, top_p=0.9),
    "paper, TL;DR": Sampling(temperature=0.7, top_k=50),
}


def exact(logits, sampling):
    """The distribution by its definition, in f64, token by token."""
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k]
    mass = np.exp(scaled[order] - scaled.max())
    mass /= mass.sum()
    kept, before = [], 0.0
    for token, probability in zip(order, mass, strict=True):
        if before >= sampling.top_p:
            break
        kept.append(token)
        before += probability
    probabilities = np.zeros(len(scaled))
    probabilities[kept] = np.exp(scaled[kept] - scaled.max())
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("name", WARPERS)
def test_frequencies_match_the_exact_distribution(name):
    sampling = WARPERS[name]
    keys = jax.random.split(jax.random.key(3), DRAWS)
    sample = jax.jit(lambda k: draw(k, jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS))), sampling))
    drawn = sample(keys)
    want = exact(LOGITS, sampling)
    counts = np.bincount(drawn.tokens, minlength=len(LOGITS))
    assert counts[want == 0].sum() == 0
    likely = want * DRAWS >= 5
    if likely.sum() > 1:
        observed = np.append(counts[likely], counts[~likely].sum())
        expected = np.append(want[likely], want[~likely].sum()) * DRAWS
        keep = expected > 0
        assert scipy.stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3

    policy = exact(LOGITS, Sampling())
    np.testing.assert_allclose(drawn.log_probs, np.log(policy[drawn.tokens]), atol=1e-5)
    np.testing.assert_allclose(drawn.warped_log_probs, np.log(want[drawn.tokens]), atol=1e-5)


def test_the_chi_square_would_notice():
    keys = jax.random.split(jax.random.key(3), DRAWS)
    drawn = draw(keys, jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS))), Sampling(temperature=1.05))
    counts = np.bincount(drawn.tokens, minlength=len(LOGITS))[exact(LOGITS, Sampling()) > 1e-6]
    want = exact(LOGITS, Sampling())[exact(LOGITS, Sampling()) > 1e-6] * DRAWS
    assert scipy.stats.chisquare(counts, want * counts.sum() / want.sum()).pvalue < 1e-3


def test_greedy_takes_the_lowest_of_equals():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    drawn = draw(jax.random.split(jax.random.key(0), 2), logits, Sampling(temperature=0))
    np.testing.assert_array_equal(drawn.tokens, [1, 0])
    np.testing.assert_array_equal(drawn.warped_log_probs, [0, 0])
    np.testing.assert_allclose(drawn.log_probs, jax.nn.log_softmax(logits)[[0, 1], [1, 0]])


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_top_p_without_a_sort_keeps_what_a_sort_would(top_p):
    logits = jax.random.normal(jax.random.key(1), (64, 500)) * jnp.linspace(0.1, 5, 64)[:, None]
    kept, _ = warp(logits, Sampling(top_p=top_p))
    for row, survivors in zip(np.asarray(logits), np.isfinite(kept), strict=True):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        above = np.array([probabilities[probabilities > p].sum() for p in probabilities])
        clear = np.abs(above - top_p) > 1e-5
        np.testing.assert_array_equal(survivors[clear], (above < top_p)[clear])


@pytest.mark.parametrize("top_k", [None, 63, 64])
def test_equal_tokens_are_kept_from_the_lowest_id_on(top_k):
    kept, ids = warp(jnp.zeros((2, 64)), Sampling(top_k=top_k, top_p=0.25))
    survivors = np.broadcast_to(ids, kept.shape)[np.isfinite(kept)].reshape(2, -1)
    np.testing.assert_array_equal(survivors, [np.arange(len(survivors[0]))] * 2)
    assert len(survivors[0]) == 16


@pytest.mark.parametrize("levels", [2, 40, 10**6])
@pytest.mark.parametrize(("size", "k"), [(5000, 7), (12_289, 50), (300, 50), (6400, 1)])
def test_the_largest_are_found_without_a_sort(size, k, levels):
    rng = np.random.default_rng(size + levels)
    x = rng.integers(0, levels, (3, 2, size)).astype(np.float32)
    x[0, 0, 10:] = -np.inf
    x[1, 1] = -np.inf
    found, places = jax.jit(top_k, static_argnums=1)(x, k)
    expected = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(x, expected, axis=-1))


def test_noise_is_that_of_jax_random_and_belongs_to_the_token():
    keys = jax.random.split(jax.random.key(5), 3)
    ids = jnp.array([[7, 0, 999], [3, 3, 1], [500, 2, 4]])
    bits = jax.vmap(lambda key: jax.random.bits(key, (1000,)))(keys)
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    want = np.take_along_axis(np.asarray(-jnp.log(-jnp.log(uniform))), np.asarray(ids), axis=1)
    np.testing.assert_allclose(gumbel_noise(keys, ids), want, rtol=1e-5)


def test_a_draw_is_the_same_among_k_tokens_or_all():
    keys = jax.random.split(jax.random.key(2), 2000)
    logits = jnp.broadcast_to(LOGITS, (2000, len(LOGITS)))
    few = draw(keys, logits, Sampling(top_k=10))
    every = draw(keys, logits, Sampling())
    np.testing.assert_array_equal(few.tokens, every.tokens)


def test_noise_can_be_handed_in():
    rng = np.random.default_rng(0)
    logits, noise = rng.normal(size=(2, 50, 30)), rng.gumbel(size=(2, 50, 30))
    keys = jax.random.split(jax.random.key(0), (2, 50))
    for sampling in (Sampling(temperature=0.5), Sampling(temperature=0.5, top_k=30)):
        drawn = draw(keys, jnp.asarray(logits), sampling, jnp.asarray(noise))
        np.testing.assert_array_equal(drawn.tokens, (logits / 0.5 + noise).argmax(-1))


def test_keys_depend_on_seed_and_name_alone():
    one = jax.random.key_data(prompt_keys(0, ["a", "b", "c"]))
    other = jax.random.key_data(prompt_keys(0, ["c", "x", "a"]))
    np.testing.assert_array_equal(one[0], other[2])
    np.testing.assert_array_equal(one[2], other[0])
    assert len(np.unique(np.concatenate([one, other, prompt_keys_data(1)]), axis=0)) == 7
    few = jax.random.key_data(draw_keys(prompt_keys(0, ["a"]), jnp.int32(3), 2))
    many = jax.random.key_data(draw_keys(prompt_keys(0, ["a"]), jnp.int32(3), 5))
    np.testing.assert_array_equal(few[0], many[0, :2])


def prompt_keys_data(seed):
    return jax.random.key_data(prompt_keys(seed, ["a", "b", "c"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or .* Got: -1.0"),
        ({"temperature": 1e-38}, r"temperature must be 0 \(greedy\) or .* Got: 1e-38"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be None or at least 1. Got: 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]. Got: 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]. Got: 1.5"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_other_generators_are_refused():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 2)
    with pytest.raises(ValueError, match="threefry"):
        draw(keys, jnp.zeros((2, 4)), Sampling())


class DrawVariants(chex.TestCase):
    """The same draw jitted, not jitted and on a device."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters(Sampling(), Sampling(0.7, 4, 0.9), Sampling(temperature=0))
    def test_draw(self, sampling):
        keys = jax.random.split(jax.random.key(0), 16)
        logits = jax.random.normal(jax.random.key(1), (16, 40))
        drawn = self.variant(lambda k, x: draw(k, x, sampling))(keys, logits)
        want = draw(keys, logits, sampling)
        np.testing.assert_array_equal(drawn.tokens, want.tokens)
        chex.assert_trees_all_close(drawn, want, atol=1e-5)

    def test_shapes_are_checked(self):
        keys = jax.random.split(jax.random.key(0), 3)
        with pytest.raises(AssertionError):
            draw(keys, jnp.zeros((2, 4)), Sampling())
        with pytest.raises(AssertionError):
            draw(keys, jnp.zeros((3, 4)), Sampling(), noise=jnp.zeros((3, 5)))
