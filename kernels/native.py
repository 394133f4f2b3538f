"""Kernels in C++ (`cpu/`), compiled for the processor at hand and registered with XLA.

They are compiled when they are first needed, which takes some seconds, and kept in
`$XDG_CACHE_HOME/iro_jax/native` (`~/.cache` by default), one library for each kind of processor,
version of JAX, and source. This needs a C++ compiler: `$CXX`, `g++` or `clang++`. Without one, or
with `IRO_JAX_NATIVE=0` in the environment, XLA computes everything, with equal results up to
rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from absl import logging
from jax.sharding import AxisType
from jaxtyping import Array

MATMUL, MATMUL_TRANSPOSED = "iro_jax_matmul", "iro_jax_matmul_transposed"
MATMUL_CODED = "iro_jax_matmul_coded"
ENCODE, ENCODE_TRANSPOSED = "iro_jax_encode", "iro_jax_encode_transposed"
ATTEND = "iro_jax_attend"
ROTATE = "iro_jax_rotate_heads"
LOGSUMEXP, TOP_K = "iro_jax_logsumexp", "iro_jax_top_k"
"""The names under which XLA knows them."""

_SYMBOLS = {
    MATMUL: "IroMatmul",
    MATMUL_TRANSPOSED: "IroMatmulTransposed",
    MATMUL_CODED: "IroMatmulCoded",
    ENCODE: "IroEncode",
    ENCODE_TRANSPOSED: "IroEncodeTransposed",
    ATTEND: "IroAttend",
    ROTATE: "IroRotateHeads",
    LOGSUMEXP: "IroLogSumExp",
    TOP_K: "IroTopK",
}
_FOLDER = Path(__file__).parent / "cpu"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
_COMPILERS = ("g++", "clang++")


@functools.cache
def available() -> bool:
    """Whether the kernels can be called; compiles and registers them at the first call.

    A warning says why they cannot, unless that was asked for.
    """
    if os.environ.get("IRO_JAX_NATIVE", "1") == "0":
        return False
    try:
        # It stays loaded for as long as programs may call it: until the process ends.
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        logging.warning("XLA computes on this CPU what kernels would compute faster: %s", error)
        return False
    for name, symbol in _SYMBOLS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(loaded[symbol]), platform="cpu")
    return True


def takes(*operands: Array) -> bool:
    """Whether kernels can compute with these: in f32, on one device, on this machine's CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    # XLA cannot look into a kernel: it could not split it over a mesh, and inside `jax.shard_map`
    # it does not know how the result varies.
    alone = mesh.size <= 1 and AxisType.Manual not in mesh.axis_types
    if not alone or any(x.dtype != jnp.float32 for x in operands):
        return False
    return jax.default_backend() == "cpu" and available()


def _compiled() -> Path:
    """The library, from the cache where it is there.

    Raises:
      OSError: there is no compiler, or nowhere to write.
      subprocess.SubprocessError: the compiler failed.
    """
    name = f"{hashlib.sha256(_identity()).hexdigest()[:16]}.so"
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "iro_jax" / "native"
    )
    if (folder / name).exists():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=folder)
    except OSError:  # a home that cannot be written: compiled again by every process
        scratch = tempfile.mkdtemp(prefix="iro_jax_native_")
        folder = Path(scratch)
    try:
        _compile(Path(scratch) / "new.so")
        # At once, so that processes that start together never see half a library.
        os.replace(Path(scratch) / "new.so", folder / name)
    finally:
        if folder != Path(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
    return folder / name


def _compile(target: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise FileNotFoundError(f"found no C++ compiler; wanted $CXX or one of {_COMPILERS}")
    logging.info("Compiling kernels for this CPU")
    sources = [str(path) for path in _sources() if path.suffix == ".cc"]
    command = [*compiler.split(), *_FLAGS, "-I", jax.ffi.include_dir(), *sources]
    done = subprocess.run(
        [*command, "-o", str(target)], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise subprocess.SubprocessError(f"{compiler} failed: {done.stderr.strip()[-500:]}")


def _identity() -> bytes:
    """What a library is good for: one source, one interface of XLA, one kind of processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        processor = []
    parts = [jaxlib.__version__, *_FLAGS, platform.system(), platform.machine()]
    texts = [path.read_text() for path in _sources()]
    return "\n".join([*parts, *sorted(set(processor)), *texts]).encode()


def _sources() -> list[Path]:
    return sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cc", ".h"))
