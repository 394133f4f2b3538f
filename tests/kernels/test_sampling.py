"""The fused draw is the draw of `iro_jax.models.sampling`, token for token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from iro_jax.models.sampling import Sampling, draw
from kernels import fused_draw
from kernels.sampling_algorithm import Warpers
from kernels.sampling_gpu import gpu_kernel
from kernels.sampling_tpu import tpu_kernel
from kernels.sampling_xla import reference

ROWS = 11

IMPLEMENTATIONS = {
    "xla": reference,
    "tpu": functools.partial(tpu_kernel, interpret=True),
    "gpu": functools.partial(gpu_kernel, interpret=True),
}

WARPERS = {
    "plain": (1.0, None, 1.0),
    "top-k": (0.7, 20, 1.0),
    "top-p": (0.6, None, 0.9),
    "top-k and top-p": (0.6, 50, 0.9),
    "one token": (1.3, 1, 1.0),
    "more than there are": (1.0, 5000, 0.3),
    "cold": (1e-4, 7, 0.5),
    "greedy": (0.0, 5, 0.5),
}


def logits_of(kind, vocabulary):
    """`[ROWS, vocabulary]`."""
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(ROWS, vocabulary)) * 2
    if kind == "ties":
        # Halves, some of them -0.0.
        logits = np.round(logits * 2) / 2
    elif kind == "all equal":
        logits[:] = -1.5
    elif kind == "ruled out":
        logits[rng.random(logits.shape) < 0.9] = -np.inf
    elif kind == "peaked":
        logits[:, vocabulary // 3] += 40
    return jnp.asarray(logits, jnp.float32)


def keys_of(seed):
    return jax.random.split(jax.random.key(seed), ROWS)


sorted_draw = jax.jit(draw, static_argnames="sampling")


def assert_same_draw(found, keys, logits, warpers):
    want = sorted_draw(keys, logits, sampling=Sampling(*warpers))
    np.testing.assert_array_equal(found.tokens, want.tokens)
    np.testing.assert_allclose(found.log_probs, want.log_probs, atol=3e-6)
    np.testing.assert_allclose(found.warped_log_probs, want.warped_log_probs, atol=3e-6)


# The kernels differ in where they keep numbers, not in what they compute.
BRIEF = ("top-p", "top-k and top-p", "greedy")


@pytest.mark.parametrize(
    ("implementation", "name"),
    [(fn, name) for fn in IMPLEMENTATIONS for name in WARPERS if fn != "gpu" or name in BRIEF],
)
def test_equals_the_draw_by_sorting(implementation, name):
    fn = jax.jit(
        functools.partial(IMPLEMENTATIONS[implementation], warpers=Warpers(*WARPERS[name]))
    )
    for kind in ("random", "ties", "all equal", "ruled out", "peaked"):
        logits, keys = logits_of(kind, 1000), keys_of(len(kind))
        assert_same_draw(fn(jax.random.key_data(keys), logits), keys, logits, WARPERS[name])


@pytest.mark.parametrize("vocabulary", [1, 128, 5000])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_size_of_vocabulary(implementation, vocabulary):
    """Those of more than 2048 tokens take the kernels several chunks."""
    warpers = WARPERS["top-k and top-p"]
    logits, keys = logits_of("ties", vocabulary), keys_of(vocabulary)
    fn = jax.jit(functools.partial(IMPLEMENTATIONS[implementation], warpers=Warpers(*warpers)))
    assert_same_draw(fn(jax.random.key_data(keys), logits), keys, logits, warpers)


@pytest.mark.parametrize(
    ("shards", "name"),
    [(2, "top-k and top-p"), (4, "top-p"), (8, "cold"), (4, "greedy")],
)
def test_the_draw_does_not_depend_on_the_sharding(shards, name):
    temperature, top_k, top_p = WARPERS[name]
    mesh = jax.make_mesh((shards,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    for implementation in ("auto", "interpret"):
        fn = jax.jit(
            jax.shard_map(
                functools.partial(
                    fused_draw,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    axis_name="model",
                    implementation=implementation,
                ),
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec(None, "model")),
                out_specs=PartitionSpec(),
                # The interpreter does not keep account of what its arrays vary over.
                check_vma=implementation == "auto",
            )
        )
        for kind in ("random", "ties", "all equal"):
            logits, keys = logits_of(kind, 1000), keys_of(shards)
            assert_same_draw(fn(jax.random.key_data(keys), logits), keys, logits, WARPERS[name])


def test_draws_follow_the_warped_distribution():
    """Of 0.5, 0.3, 0.15 and 0.05, top-p 0.8 keeps two: 5/8 and 3/8 of the draws."""
    count = 4000
    logits = jnp.tile(jnp.log(jnp.array([0.15, 0.5, 0.05, 0.3])), (count, 1))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), count))
    found = fused_draw(keys, logits, top_p=0.79)
    frequencies = np.bincount(found.tokens, minlength=4) / count
    np.testing.assert_allclose(frequencies, [0, 5 / 8, 0, 3 / 8], atol=0.025)
    chosen = np.where(np.asarray(found.tokens) == 1, 5 / 8, 3 / 8)
    np.testing.assert_allclose(found.warped_log_probs, np.log(chosen), atol=1e-6)


def test_arguments_that_do_not_fit_are_refused():
    keys, logits = jax.random.key_data(keys_of(0)), logits_of("random", 16)
    for wrong, match in (
        ({"temperature": -1.0}, "temperature .* Got: -1.0"),
        ({"top_k": 0}, "top_k .* Got: 0"),
        ({"top_p": 0.0}, "top_p .* Got: 0.0"),
    ):
        with pytest.raises(ValueError, match=match):
            fused_draw(keys, logits, **wrong)
    with pytest.raises(ValueError, match="logits must be f32"):
        fused_draw(keys, logits.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="key_data must be uint32"):
        fused_draw(keys[:1], logits)
