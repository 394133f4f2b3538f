"""The kernels compile for TPUs and lower for GPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kernels import Part, fused_draw, prefix_attention
from tests.kernels import tpu_programs
from tests.libtpu import compiled_by

PROGRAMS = [
    f"{topology} {name}"
    for topology in tpu_programs.TOPOLOGIES
    for name in (
        *(f"attention {name}" for name in tpu_programs.ATTENTION),
        *(f"draw {name}" for name in tpu_programs.DRAWS),
    )
]


@pytest.fixture(scope="module")
def compiled():
    """What `tpu_programs` prints."""
    return compiled_by("tests.kernels.tpu_programs")


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_for_tpu_with_its_kernel(compiled, name):
    assert compiled[name]["kernels"] >= 1


@pytest.mark.parametrize("topology", tpu_programs.TOPOLOGIES)
def test_no_cache_is_copied_on_its_way_into_the_kernel(compiled, topology):
    """All that XLA does around the kernel touches a small part of the caches' bytes."""
    facts = compiled[f"{topology} attention Llama-3 8B"]
    assert facts["kernels"] == 1
    assert facts["outside_bytes"] < 0.05 * facts["argument_bytes"]
    assert facts["temp_bytes"] < 0.05 * facts["argument_bytes"]


@pytest.mark.parametrize("topology", tpu_programs.TOPOLOGIES)
def test_no_device_holds_the_logits_of_all_shards(compiled, topology):
    facts = compiled[f"{topology} draw Llama-3, four shards"]
    rows, vocabulary, *_, devices = tpu_programs.DRAWS["Llama-3, four shards"]
    assert facts["all_gathers"] == 0
    assert 0 < facts["all_reduces"] < 20
    assert facts["argument_bytes"] + facts["temp_bytes"] < 2 * 4 * rows * vocabulary / devices


def lowered(fn, *arguments):
    """The program for an H100, which Triton's lowering must know of."""
    device = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("sizes", tpu_programs.ATTENTION.values(), ids=tpu_programs.ATTENTION)
def test_attention_lowers_to_triton(sizes):
    """A launch a part. Triton's own compiler runs only where there is a GPU."""
    arguments = tpu_programs.attention_arguments(None, *sizes)
    fn = functools.partial(prefix_attention, window=900, softcap=30.0)
    assert lowered(fn, *arguments).count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("vocabulary", [61, 128256])
def test_the_draw_lowers_to_triton(vocabulary):
    keys = jax.ShapeDtypeStruct((32, 2), jnp.uint32)
    logits = jax.ShapeDtypeStruct((32, vocabulary), jnp.float32)
    fn = functools.partial(fused_draw, temperature=0.6, top_k=50, top_p=0.9)
    assert lowered(fn, keys, logits).count("__gpu$xla.gpu.triton") == 1


def test_a_cpu_gets_no_kernel():
    lead = (1, 1, 1)
    queries = jnp.ones((*lead, 1, 1, 8))
    part = [
        Part(*[jnp.ones((*lead[:n], 1, 4, 8))] * 2, jnp.zeros((*lead[:n], 4), int))
        for n in (1, 2, 3)
    ]
    fn = jax.jit(prefix_attention)
    text = fn.lower(queries, jnp.ones(lead, int), *part, jnp.int32(4)).as_text()
    assert "custom_call" not in text
