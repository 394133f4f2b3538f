"""Kernels in C++, compiled for the processor at hand and registered with XLA.

They are compiled when they are first needed, which takes some seconds, and kept in
`$XDG_CACHE_HOME/iro_jax/native` (`~/.cache` by default), one library for each processor, version
of JAX, and source. This needs a C++ compiler: `$CXX`, `g++` or `clang++`. Without one, or with
`IRO_JAX_NATIVE=0` in the environment, XLA computes everything, with equal results up to rounding.
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
import jaxlib
from absl import logging

MATMUL = "iro_jax_matmul"
"""The name under which XLA knows the product."""

_SOURCE = Path(__file__).parent / "matmul_cpu.cc"
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
        library = _compiled()
    except (OSError, subprocess.SubprocessError) as error:
        logging.warning("Products on this CPU are left to XLA, which is slower: %s", error)
        return False
    # The library must stay loaded for as long as programs may call it: until the process ends.
    symbol = ctypes.CDLL(str(library)).IroMatmul
    jax.ffi.register_ffi_target(MATMUL, jax.ffi.pycapsule(symbol), platform="cpu")
    return True


def _compiled() -> Path:
    """The library, from the cache where it is there.

    Raises:
      OSError: there is no compiler, or nowhere to write.
      subprocess.SubprocessError: the compiler failed.
    """
    name = f"{hashlib.sha256(_identity()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "iro_jax" / "native"
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
    logging.info("Compiling %s for this CPU", _SOURCE.name)
    command = [*compiler.split(), *_FLAGS, "-I", jax.ffi.include_dir()]
    done = subprocess.run(
        [*command, str(_SOURCE), "-o", str(target)], capture_output=True, text=True, timeout=300
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
    parts = [jaxlib.__version__, *_FLAGS, platform.platform(), platform.processor()]
    return "\n".join([*parts, *sorted(set(processor))]).encode() + _SOURCE.read_bytes()
