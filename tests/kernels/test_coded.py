"""Coded weights against the quantisations that they undo, and their product against f32's."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import Coded, encode, matmul, matmul_coded, native

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")
CALL = f"@{native.MATMUL_CODED}"
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 8, "Q5_1": 8, "Q8_0": 8}


def quantised(k, n, kind="Q4_1", seed=0, scale=0.05):
    """Weights `[k, n]` as a GGUF file gives them."""
    kind = gguf.GGMLQuantizationType[kind]
    weights = np.random.default_rng(seed).normal(0, scale, (n, k)).astype("f")
    return np.ascontiguousarray(gguf.dequantize(gguf.quantize(weights, kind), kind).T)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("shape", [(32, 1), (64, 48), (96, 50), (576, 200)])
@pytest.mark.parametrize("scale", [1e-3, 0.05, 30.0])
def test_nothing_is_lost(kind, shape, scale):
    w = quantised(*shape, kind, scale=scale)
    coded = encode(jnp.asarray(w))
    assert coded is not None
    assert coded.bits == BITS[kind]
    np.testing.assert_array_equal(coded.whole(), w)
    picked = np.random.default_rng(0).integers(0, shape[1], (3, 2))
    np.testing.assert_array_equal(jax.jit(Coded.outputs)(coded, picked), w.T[picked])
    from_transpose = encode(jnp.asarray(w.T), transposed=True)
    jax.tree.map(np.testing.assert_array_equal, from_transpose, coded)


def test_blocks_of_one_number():
    w = quantised(64, 48)
    w[:32, :5], w[32:, 7] = 0.0, -0.25
    coded = encode(jnp.asarray(w))
    assert coded is not None
    np.testing.assert_array_equal(coded.whole(), w)


def test_codes_take_an_eighth_and_lines_a_sixteenth():
    coded = encode(jnp.asarray(quantised(512, 480)))
    assert coded is not None
    assert coded.words.nbytes == 512 * 480 / 2
    assert coded.lines.nbytes == 512 * 480 / 4


def test_what_does_not_come_out_to_the_last_bit_stays():
    w = quantised(64, 48)
    for row, column in ((0, 0), (63, 47), (31, 5)):
        changed = w.copy()
        changed[row, column] = np.nextafter(w[row, column], np.float32(1))
        assert encode(jnp.asarray(changed)) is None
    rng = np.random.default_rng(0)
    assert encode(jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)) is None
    for bad in (np.nan, np.inf):
        changed = w.copy()
        changed[3, 4] = bad
        assert encode(jnp.asarray(changed)) is None


def test_what_cannot_be_coded():
    w = jnp.asarray(quantised(64, 48))
    assert encode(w[:33]) is None
    assert encode(w.astype(jnp.bfloat16)) is None
    assert encode(w[:, :0]) is None
    assert encode(w.reshape(2, 32, 48)) is None


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(32, 1), (96, 50), (608, 200)])
def test_the_product_is_that_of_whole_weights(kind, shape):
    w = quantised(*shape, kind)
    coded = encode(jnp.asarray(w))
    product = jax.jit(matmul_coded)
    x = np.random.default_rng(1).normal(size=(600, shape[0])).astype("f")
    for rows in (4, 5, 16, 33, 161, 600):
        np.testing.assert_array_equal(product(x[:rows], coded), jax.jit(matmul)(x[:rows], w))
    some = np.random.default_rng(2).integers(0, 90, 600)
    np.testing.assert_array_equal(product(x[some], coded), np.asarray(product(x, coded))[some])
    whole = product(x, coded)
    for rows in (1, 2, 3):  # of whole weights, XLA computes these
        np.testing.assert_array_equal(product(x[:rows], coded), whole[:rows])
    scale = np.abs(x).astype(float) @ np.abs(w)
    np.testing.assert_array_less(np.abs(whole - x.astype(float) @ w), 1e-6 * scale + 1e-30)


def test_the_kernel_takes_what_it_can():
    coded = encode(jnp.asarray(quantised(32, 7)))
    x = jnp.ones((1, 32))
    assert CALL in jax.jit(matmul_coded).lower(x, coded).as_text()
    half = x.astype(jnp.bfloat16)
    assert CALL not in jax.jit(matmul_coded).lower(half, coded).as_text()
    tpu = jax.jit(matmul_coded).trace(x, coded).lower(lowering_platforms=("tpu",))
    assert CALL not in tpu.as_text()


def test_without_the_kernel_it_is_the_product_too(request):
    w = quantised(96, 50)
    coded = encode(jnp.asarray(w))
    x = np.random.default_rng(1).normal(size=(7, 96)).astype("f")
    request.getfixturevalue("xla_alone")
    assert encode(jnp.asarray(w)) is None
    found = jax.jit(matmul_coded)(x, coded)
    np.testing.assert_allclose(found, x @ w, rtol=1e-4, atol=1e-5)


def test_derivatives():
    w = quantised(96, 50)
    coded = encode(jnp.asarray(w))
    x = np.random.default_rng(1).normal(size=(7, 96)).astype("f")
    found = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(matmul_coded(x, coded)))))(x)
    wanted = jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_batches():
    stack = [encode(jnp.asarray(quantised(64, 50, seed=seed))) for seed in (0, 1)]
    x = np.random.default_rng(1).normal(size=(7, 64)).astype("f")
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    found = jax.jit(jax.vmap(matmul_coded, (None, 0)))(x, both)
    for one, coded in zip(found, stack, strict=True):
        np.testing.assert_array_equal(one, matmul_coded(jnp.asarray(x), coded))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"x must be \[M, 64\]. Got: \(8, 32\)"):
        matmul_coded(jnp.zeros((8, 32)), encode(jnp.asarray(quantised(64, 5))))
