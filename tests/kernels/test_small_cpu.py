"""The rotation of heads, the normaliser and the largest on CPUs against f64, sorting and XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models import Sampling, draw, prompt_keys
from iro_jax.models.rope import _rotate_by_xla, rotate_heads
from kernels import native
from kernels.logsumexp_cpu import logsumexp_on_cpu
from kernels.top_k_cpu import top_k_on_cpu

compiled = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")


def projection(batch, length, kv_heads, group, size, half, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*batch, length, kv_heads, group + 2, size)).astype("f")
    angles = rng.uniform(-100, 100, size=(*batch, length, half))
    return x, np.cos(angles).astype("f"), np.sin(angles).astype("f"), angles


@compiled
@pytest.mark.parametrize(
    "shape",
    [
        ((1,), 1, 1, 1, 2, 1),
        ((2, 3), 5, 3, 3, 64, 32),
        ((7,), 13, 2, 4, 80, 17),  # a part of the channels, and no whole vectors
        ((40,), 1, 1, 8, 24, 12),
        ((40,), 30, 3, 3, 64, 32),  # enough for several threads
    ],
)
def test_channels_turn_by_their_angles(shape):
    x, cosines, sines, angles = projection(*shape)
    half, group = angles.shape[-1], x.shape[-2] - 2
    call = jax.jit(rotate_heads, static_argnames="scale")
    assert native.ROTATE in call.lower(x, cosines, sines, scale=0.3).as_text()
    queries, keys, values = call(x, cosines, sines, scale=0.3)

    # Pairs of channels as complex numbers, in f64.
    wanted = x.astype(float)
    turned = (wanted[..., :half] + 1j * wanted[..., half : 2 * half]) * np.exp(
        1j * angles[..., None, None, :]
    )
    wanted[..., :half], wanted[..., half : 2 * half] = turned.real, turned.imag
    np.testing.assert_allclose(queries, 0.3 * wanted[..., :group, :], atol=2e-6)
    np.testing.assert_allclose(keys, np.swapaxes(wanted[..., group, :], -3, -2), atol=5e-6)
    np.testing.assert_array_equal(values, np.swapaxes(x[..., group + 1, :], -3, -2))


@compiled
def test_a_rotation_has_the_derivatives_of_xla():
    x, cosines, sines, _ = projection((3,), 4, 2, 3, 16, 8)

    def loss(function, x):
        return sum(jnp.sum(jnp.sin(part)) for part in function(x))

    found = jax.grad(lambda x: loss(lambda x: rotate_heads(x, cosines, sines, 0.5), x))(x)
    wanted = jax.grad(lambda x: loss(lambda x: _rotate_by_xla(0.5, x, cosines, sines), x))(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@compiled
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (2, 5, 65), (4, 4099), (129, 1000)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0])
def test_the_normaliser(shape, spread):
    x = (spread * np.random.default_rng(0).normal(size=shape) + 3).astype("f")
    wanted = np.logaddexp.reduce(x.astype(float), axis=-1)
    np.testing.assert_allclose(jax.jit(logsumexp_on_cpu)(x), wanted, rtol=2e-6, atol=2e-6)


@compiled
def test_the_normaliser_of_what_is_not_finite():
    x = np.zeros((5, 200), "f")
    x[0, 7] = -np.inf
    x[1] = -np.inf
    x[2, 150] = np.inf
    x[3, 3] = x[4, 199] = np.nan
    found = np.asarray(jax.jit(logsumexp_on_cpu)(x))
    np.testing.assert_allclose(found[:3], [np.log(199), -np.inf, np.inf], rtol=1e-6)
    assert np.isnan(found[3:]).all()


def sorted_places(x, scale):
    """Falling, NaN first, what comes first before its equals."""
    scaled = x * np.float32(scale)
    return np.lexsort((np.arange(x.size), -scaled, ~np.isnan(scaled)))


@compiled
@pytest.mark.parametrize("size", [1, 63, 64, 65, 700, 4099])
@pytest.mark.parametrize("scale", [1.0, 1 / 0.7, 1e-3])
def test_the_largest_and_their_places(size, scale):
    rng = np.random.default_rng(size)
    x = rng.normal(size=(2, 8, size)).astype("f")
    x[0, 0] = np.sort(x[0, 0])
    x[0, 1] = np.round(2 * x[0, 1])  # equal ones
    x[0, 2] = 0
    x[0, 2, ::3] = -0.0
    x[0, 3, : size // 2] = -np.inf
    x[0, 4, size // 3] = np.nan
    x[0, 5] = np.inf
    x[0, 6] = np.nan
    x[0, 7] = -x[0, 0]
    for k in {1, min(50, size), max(1, size // 3), size}:
        values, ids = jax.jit(top_k_on_cpu, static_argnums=(1, 2))(x, k, scale)
        wanted = np.stack([sorted_places(row, scale)[:k] for row in x.reshape(-1, size)])
        np.testing.assert_array_equal(ids, wanted.reshape(*x.shape[:-1], k))
        chosen = np.take_along_axis(x, np.asarray(ids), axis=-1)
        np.testing.assert_array_equal(values, chosen * np.float32(scale))


@compiled
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=50, top_p=0.9)])
def test_draws_are_those_of_xla(monkeypatch, sampling):
    keys = prompt_keys(0, [str(i) for i in range(9)])
    logits = 3 * jax.random.normal(jax.random.key(1), (9, 5000))
    by_kernel = jax.jit(draw, static_argnums=2)
    assert native.LOGSUMEXP in by_kernel.lower(keys, logits, sampling).as_text()
    found = by_kernel(keys, logits, sampling)
    monkeypatch.setattr(native, "takes", lambda *_: False)
    jax.clear_caches()
    wanted = jax.jit(draw, static_argnums=2)(keys, logits, sampling)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=3e-6)
