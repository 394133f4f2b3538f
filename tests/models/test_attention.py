"""Attention over parts is one softmax, and parts that show nothing weigh nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models import attention
from iro_jax.models.attention import Part, attend, merge, partial_attention
from iro_jax.models.cache import EMPTY, take, visible

P, K, B, N, KV, G, D = 2, 3, 2, 4, 2, 3, 5
LEADS = {"prompt": ((P,), 7), "beams": ((P, K), 5), "chunk": ((P, K, B), 6)}


def example(rng, hidden=()):
    queries = rng.normal(size=(P, K, B, N, KV, G, D)).astype(np.float32)
    parts = []
    for name, (lead, slots) in LEADS.items():
        keys, values = rng.normal(size=(2, *lead, KV, slots, D)).astype(np.float32)
        seen = rng.random((P, K, B, N, slots)) < (0.0 if name in hidden else 0.6)
        parts.append(Part(keys, values, seen))
    return queries, parts


def one_softmax(queries, parts, softcap=None):
    """Every query against the concatenation of its parts, one at a time, in f64."""
    out = np.zeros(queries.shape)
    for index in np.ndindex(P, K, B, N, KV, G):
        p, k, b, n, h, _ = index
        keys, values = [], []
        for (part_keys, part_values, seen, _), (lead, _) in zip(parts, LEADS.values(), strict=True):
            place = (p, k, b)[: len(lead)]
            keep = seen[p, k, b, n]
            keys.append(part_keys[place][h][keep])
            values.append(part_values[place][h][keep])
        scores = np.concatenate(keys).astype(float) @ queries[index].astype(float)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if len(scores):
            weights = np.exp(scores - scores.max())
            out[index] = weights @ np.concatenate(values) / weights.sum()
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("hidden", [(), ("prompt",), ("beams", "chunk"), tuple(LEADS)])
def test_parts_merge_into_one_softmax(hidden, softcap):
    queries, parts = example(np.random.default_rng(0), hidden)
    got = attend(jnp.asarray(queries), parts, softcap)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, one_softmax(queries, parts, softcap), atol=1e-5)


def test_a_hidden_part_changes_nothing_even_when_it_holds_rubbish():
    queries, parts = example(np.random.default_rng(1), hidden=("beams",))
    keys, values, seen, _ = parts[1]
    parts[1] = Part(np.full_like(keys, 1e4), np.full_like(values, 1e4), seen)
    with_rubbish = attend(jnp.asarray(queries), parts)
    without = merge([partial_attention(jnp.asarray(queries), parts[i]) for i in (0, 2)])
    np.testing.assert_allclose(with_rubbish, without, atol=1e-6)


def test_large_scores_do_not_overflow():
    queries, parts = example(np.random.default_rng(2))
    got = attend(jnp.asarray(queries * 1e3), parts)
    np.testing.assert_allclose(got, one_softmax(queries * 1e3, parts), atol=1e-3)


def test_long_queries_are_read_in_blocks(monkeypatch):
    rng = np.random.default_rng(3)
    queries = rng.normal(size=(P, 12, KV, G, D)).astype(np.float32)
    keys, values = rng.normal(size=(2, P, KV, 12, D)).astype(np.float32)
    seen = np.tril(np.ones((12, 12), bool))[None].repeat(P, 0)
    whole = attend(queries, [Part(keys, values, seen)])
    for block in (4, 5, 11):
        monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
        np.testing.assert_allclose(attend(queries, [Part(keys, values, seen)]), whole, atol=1e-6)


@pytest.mark.parametrize("used", [0, 1, 16, 17, 40, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_blocks_of_slots_that_are_not_used_are_left_out(used, softcap, monkeypatch):
    monkeypatch.setattr(attention, "SLOT_BLOCK", 16)
    rng = np.random.default_rng(5)
    queries, [prompt, *_] = example(rng)
    keys, values = rng.normal(size=(2, P, K, KV, 50, D)).astype(np.float32)
    seen = (rng.random((P, K, B, N, 50)) < 0.6) & (np.arange(50) < used)
    whole = attend(jnp.asarray(queries), [prompt, Part(keys, values, seen)], softcap)
    # Blocks beyond them are not even looked at: numbers there would make the result NaN.
    keys[..., -(-used // 16) * 16 :, :] = np.nan
    some = jax.jit(attend, static_argnums=2)(
        queries, [prompt, Part(keys, values, seen, used)], softcap
    )
    np.testing.assert_allclose(some, whole, atol=1e-6)


class Visibility(chex.TestCase):
    """The drawings in `iro_jax.models.cache`, as arrays."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_positions_alone_decide(self):
        slots = jnp.array([[4, 5, EMPTY, EMPTY, 6, 7, EMPTY]])
        see = self.variant(visible, static_argnums=2)
        seen = see(jnp.array([[[6, 8, EMPTY]]]), slots, None)
        np.testing.assert_array_equal(
            seen[0, 0].astype(int),
            [[1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
        )
        windowed = see(jnp.array([[[6, 8, 20]]]), slots, 2)
        np.testing.assert_array_equal(
            windowed[0, 0].astype(int),
            [[0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_take(self):
        x = jnp.arange(24).reshape(2, 4, 3)
        taken = self.variant(take)(x, jnp.array([[3, 0], [1, 1]]))
        np.testing.assert_array_equal(
            taken, [[[9, 10, 11], [0, 1, 2]], [[15, 16, 17], [15, 16, 17]]]
        )


def test_gradients_are_finite_where_nothing_is_visible():
    queries, parts = example(np.random.default_rng(4), hidden=tuple(LEADS))
    gradient = jax.grad(lambda q: attend(q, parts).sum())(jnp.asarray(queries))
    np.testing.assert_array_equal(gradient, 0)
