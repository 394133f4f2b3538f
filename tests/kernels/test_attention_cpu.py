"""Attention on CPUs against f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models.attention import Part, attend, attend_without_gradient
from kernels import native
from kernels.attention_cpu import Place, attend_on_cpu

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")


def exactly(queries, parts):
    """In f64, query by query, over the slots that it sees and no others."""
    tokens, heads = queries.shape[:2]
    out = np.zeros(queries.shape)
    for t in range(tokens):
        for head in range(heads):
            keys, values = [], []
            for part in parts:
                place = t // (tokens // part.keys.shape[0])
                used = part.keys.shape[2] if part.used is None else int(part.used)
                seen = np.flatnonzero(np.asarray(part.visible[t])[:used])
                keys.append(np.asarray(part.keys)[place, head, seen])
                values.append(np.asarray(part.values)[place, head, seen])
            keys, values = np.concatenate(keys).astype(float), np.concatenate(values).astype(float)
            if not len(keys):
                continue
            scores = np.asarray(queries[t, head], float) @ keys.T
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[t, head] = weights / weights.sum(-1, keepdims=True) @ values
    return out


def case(rng, tokens, heads, group, size, parts, scale=1.0):
    """Random queries and parts: pairs of places and slots."""

    def normal(*shape):
        return rng.normal(size=shape).astype("f")

    return scale * normal(tokens, heads, group, size), [
        Place(
            normal(places, heads, slots, size),
            normal(places, heads, slots, size),
            rng.random((tokens, slots)) < 0.6,
            np.int32(rng.integers(0, slots + 1)) if index % 2 else None,
        )
        for index, (places, slots) in enumerate(parts)
    ]


@pytest.mark.parametrize(
    ("tokens", "heads", "group", "size", "parts"),
    [
        (32, 3, 3, 64, [(2, 64), (8, 48), (32, 16)]),
        (96, 2, 4, 128, [(2, 100), (6, 1), (24, 4)]),
        (7, 1, 1, 5, [(1, 3)]),
        (200, 1, 7, 80, [(1, 200)]),
        (6, 5, 1, 16, [(2, 49), (6, 300)]),
        (50, 2, 128, 33, [(1, 47), (50, 1)]),
    ],
)
@pytest.mark.parametrize("scale", [0.2, 30.0])
def test_it_is_attention(tokens, heads, group, size, parts, scale):
    queries, places = case(np.random.default_rng(0), tokens, heads, group, size, parts, scale)
    found = jax.jit(attend_on_cpu)(queries, places)
    # Rounded scores: so many units in the last place of the sum of their terms' sizes.
    largest = max(np.max(np.abs(place.keys)) for place in places)
    terms = np.max(np.sum(np.abs(queries), axis=-1)) * largest
    np.testing.assert_allclose(found, exactly(queries, places), atol=1e-5 + 2**-24 * terms)


def test_who_sees_nothing_gets_zeros():
    queries, [place] = case(np.random.default_rng(0), 8, 2, 2, 16, [(2, 20)])
    place.visible[3] = False
    found = np.asarray(jax.jit(attend_on_cpu)(queries, [place]))
    assert np.all(found[3] == 0)
    assert np.all(np.any(found[[0, 1, 2, 4]] != 0, axis=-1))
    nothing = [place._replace(used=np.int32(0))]
    assert np.all(np.asarray(jax.jit(attend_on_cpu)(queries, nothing)) == 0)


def test_a_token_does_not_depend_on_those_beside_it():
    queries, places = case(np.random.default_rng(0), 60, 2, 3, 64, [(1, 130), (60, 5)])
    whole = np.asarray(jax.jit(attend_on_cpu)(queries, places))
    shared, own = places
    for first, last in ((0, 1), (31, 33), (5, 60)):
        rows = slice(first, last)
        some = [
            shared._replace(visible=shared.visible[rows]),
            own._replace(keys=own.keys[rows], values=own.values[rows], visible=own.visible[rows]),
        ]
        found = jax.jit(attend_on_cpu)(queries[rows], some)
        np.testing.assert_array_equal(found, whole[rows])


@pytest.mark.parametrize("length", [1, 5])
def test_parts_of_a_search(length):
    """Queries with all their axes, as a network has them, against the model's own attention."""
    rng = np.random.default_rng(0)
    lead, heads, group, size = (2, 3, 4), 2, 3, 16

    def part(*places, slots, used=None):
        shape = (*places, heads, slots, size)
        visible = rng.random((*lead, length, slots)) < 0.7
        return Part(
            *(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in "kv"), visible, used
        )

    queries = jnp.asarray(rng.normal(size=(*lead, length, heads, group, size)), jnp.float32)
    parts = [part(2, slots=70), part(2, 3, slots=65, used=jnp.int32(40)), part(*lead, slots=length)]
    hidden = jnp.arange(65) >= 40
    parts[1] = parts[1]._replace(visible=parts[1].visible & ~hidden)
    program = jax.jit(attend_without_gradient)
    assert f"@{native.ATTEND}" in program.lower(queries, parts).as_text()
    np.testing.assert_allclose(program(queries, parts), attend(queries, parts), atol=1e-5)
    # A soft cap is XLA's, and so is bf16.
    assert (
        f"@{native.ATTEND}"
        not in jax.jit(lambda q, p: attend_without_gradient(q, p, 30.0))
        .lower(queries, parts)
        .as_text()
    )
    half = queries.astype(jnp.bfloat16)
    assert f"@{native.ATTEND}" not in program.lower(half, parts).as_text()


def test_shapes_that_do_not_fit():
    queries, [place] = case(np.random.default_rng(0), 8, 2, 2, 16, [(2, 20)])
    wrong = place._replace(values=place.values[:, :, :10])
    with pytest.raises(Exception, match="shape does not fit"):
        jax.block_until_ready(jax.jit(attend_on_cpu)(queries, [wrong]))
