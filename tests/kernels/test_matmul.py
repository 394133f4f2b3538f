"""The product on CPUs against f64, and what happens where it cannot be compiled."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels import matmul, matmul_transposed, native
from kernels.matmul import FEWEST_ROWS

compiled = pytest.mark.skipif(not native.available(), reason="there is no C++ compiler")
CALL = f"@{native.MATMUL}"


def operands(m, k, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, k)).astype("f"), rng.normal(size=(k, n)).astype("f")


@compiled
@pytest.mark.parametrize(
    "shape",
    [
        (8, 1, 1),
        (9, 5, 47),
        (15, 576, 48),
        (64, 577, 49),
        (300, 1200, 1001),
        (513, 33, 200),
    ],
)
def test_it_is_the_product(shape):
    x, w = operands(*shape)
    wanted = x.astype(float) @ w
    scale = np.abs(x).astype(float) @ np.abs(w)
    for y in (jax.jit(matmul)(x, w), jax.jit(matmul_transposed)(x, w.T.copy())):
        np.testing.assert_array_less(np.abs(y - wanted), 1e-6 * scale + 1e-30)


@compiled
def test_an_empty_sum():
    assert np.all(jax.jit(matmul)(*operands(8, 0, 3)) == np.zeros((8, 3)))


@compiled
def test_a_row_does_not_depend_on_those_beside_it():
    x, w = operands(700, 600, 100)
    for product, weights in ((matmul, w), (matmul_transposed, w.T.copy())):
        whole = np.asarray(jax.jit(product)(x, weights))
        for first, last in ((5, 9), (0, 8), (3, 300), (255, 264), (690, 700)):
            part = jax.jit(product)(x[first:last], weights)
            np.testing.assert_array_equal(part, whole[first:last])


def repeated(x, seed=0):
    """Rows of x in any order and number, some of which are nearly others, or zeros, or infinite."""
    rng = np.random.default_rng(seed)
    rows = x[rng.integers(0, len(x) // 2, len(x))]
    rows[::7, rng.integers(0, x.shape[1])] += 1.0
    rows[1::11] = rows[1] * [[np.inf]]
    rows[2::13] = 0.0
    return rows


@compiled
@pytest.mark.parametrize("shape", [(4, 3, 5), (64, 576, 49), (700, 600, 100)])
def test_equal_rows_have_equal_products(shape):
    x, w = operands(*shape)
    x = repeated(x)
    for product, weights in ((matmul, w), (matmul_transposed, w.T.copy())):
        whole = np.asarray(jax.jit(product)(x, weights))
        # Beside rows of other numbers, no two of these are equal.
        others = np.random.default_rng(1).normal(size=(FEWEST_ROWS, shape[1])).astype("f")
        for row, wanted in zip(x, whole, strict=True):
            others[0] = row
            np.testing.assert_array_equal(jax.jit(product)(others, weights)[0], wanted)


@compiled
def test_the_kernel_takes_what_it_can():
    x, w = operands(FEWEST_ROWS, 5, 7)
    assert CALL in jax.jit(matmul).lower(x, w).as_text()
    assert CALL not in jax.jit(matmul).lower(x[1:], w).as_text()
    half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    assert CALL not in jax.jit(matmul).lower(*half).as_text()
    assert CALL not in jax.jit(matmul).trace(x, w).lower(lowering_platforms=("tpu",)).as_text()


@compiled
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_is_left_to_xla(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x, w = operands(64, 5, 7)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        assert CALL not in jax.jit(matmul).lower(x, w).as_text()
        np.testing.assert_allclose(jax.jit(matmul)(x, w), np.asarray(x) @ w, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("devices", [1, 8])
def test_what_runs_by_hand_on_each_device_is_left_to_xla(devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    spread = jax.shard_map(matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    x, w = operands(64, 5, 7)
    assert CALL not in jax.jit(spread).lower(x, w).as_text()
    np.testing.assert_allclose(jax.jit(spread)(x, w), x @ w, rtol=1e-4, atol=1e-5)


@compiled
def test_derivatives_and_batches():
    x, w = operands(20, 30, 40)

    def loss(product, x, w):
        return jnp.sum(jnp.sin(product(x, w)))

    found = jax.jit(jax.grad(lambda x, w: loss(matmul, x, w), (0, 1)))(x, w)
    wanted = jax.grad(lambda x, w: loss(jnp.matmul, x, w), (0, 1))(x, w)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    found = jax.jit(jax.grad(lambda x, w: loss(matmul_transposed, x, w.T), (0, 1)))(x, w)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    stack = np.stack([w, 2 * w])
    batched = jax.jit(jax.vmap(matmul, (None, 0)))(x, stack)
    np.testing.assert_allclose(batched, x @ stack, rtol=1e-4, atol=1e-4)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\[M, K\] and \[K, N\]. Got: \(8, 5\) and \(7, 5\)"):
        matmul(jnp.zeros((8, 5)), jnp.zeros((7, 5)))
    with pytest.raises(ValueError, match=r"\[M, K\] and \[N, K\]. Got: \(8, 5\) and \(5, 7\)"):
        matmul_transposed(jnp.zeros((8, 5)), jnp.zeros((5, 7)))


PROGRAM = """
import jax.numpy as jnp
from kernels import matmul, native
print(float(matmul(jnp.ones((8, 3)), jnp.ones((3, 5))).sum()), native.available())
"""


def run(tmp_path, **variables):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split(), done.stderr


@compiled
def test_it_is_compiled_once(tmp_path):
    assert run(tmp_path)[0] == ["120.0", "True"]
    [library] = (tmp_path / "iro_jax" / "native").iterdir()
    changed = library.stat().st_mtime_ns
    # What would compile it again is not there any more.
    assert run(tmp_path, CXX="no-such-compiler")[0] == ["120.0", "True"]
    assert library.stat().st_mtime_ns == changed


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_xla_computes_it_and_says_so(tmp_path, compiler):
    printed, errors = run(tmp_path, CXX=compiler)
    assert printed == ["120.0", "False"]
    assert errors.count("XLA computes on this CPU what kernels would") == 1
    assert not [*(tmp_path / "iro_jax" / "native").iterdir()]


def test_it_can_be_switched_off(tmp_path):
    printed, errors = run(tmp_path, IRO_JAX_NATIVE="0")
    assert printed == ["120.0", "False"]
    assert "kernels would" not in errors


@compiled
def test_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "iro_jax").write_text("a file where the folder should be")
    assert run(tmp_path)[0] == ["120.0", "True"]
