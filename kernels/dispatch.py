"""Which implementation of a kernel runs where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

from jax import lax

Implementation = Literal["auto", "xla", "tpu", "gpu", "interpret"]
"""How a kernel is computed.

`auto` takes the platform that the program is lowered for: Mosaic on TPU, Triton on CUDA and
ROCm, plain XLA elsewhere. `interpret` runs the TPU kernel in Pallas's interpreter.
"""

_T = TypeVar("_T")


def dispatch(
    implementation: Implementation,
    *args: Any,
    xla: Callable[..., _T],
    tpu: Callable[..., _T],
    gpu: Callable[..., _T],
    interpret: Callable[..., _T],
) -> _T:
    """Applies the chosen implementation to `args`.

    Raises:
      ValueError: no such implementation.
    """
    if implementation == "auto":
        return lax.platform_dependent(*args, tpu=tpu, cuda=gpu, rocm=gpu, default=xla)
    chosen = {"xla": xla, "tpu": tpu, "gpu": gpu, "interpret": interpret}.get(implementation)
    if chosen is None:
        raise ValueError(
            f"implementation must be one of {get_args(Implementation)}. Got: {implementation!r}"
        )
    return chosen(*args)
