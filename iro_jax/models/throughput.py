"""How fast networks read: tokens a second, slots that padding takes, and the share of the peak.

The peak of a known accelerator is the dense bf16 figure of its data sheet, whatever the precision
that is computed in; of anything else, a CPU's among them, it is what one large matrix product
reaches here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s of a device by its `device_kind`; the first that matches.
_DATA_SHEETS = (
    (r"\bA100\b", 312e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH[12]00\b", 989e12),
    (r"\bL4\b", 121e12),
    (r"^TPU v4\b", 275e12),
    (r"^TPU v5( lite|e)\b", 197e12),
    (r"^TPU v5p?\b", 459e12),
    (r"^TPU v6( lite|e)\b", 918e12),
)


@dataclasses.dataclass(frozen=True)
class Peak:
    """What the devices that share a computation can do at most.

    Attributes:
      flops: a second.
      source: where the number is from.
    """

    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:,.3g} TFLOP/s ({self.source})"


@dataclasses.dataclass(frozen=True)
class Work:
    """What was computed; adds up.

    Attributes:
      tokens: real ones that were read.
      slots: places for them, padding included.
      flops: what the tokens need; padding and layers that are computed twice do not count.
    """

    tokens: int = 0
    slots: int = 0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.slots + other.slots, self.flops + other.flops)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Work and the time it took.

    >>> print(Throughput(Work(3000, 4000, 3e12), 2.0, Peak(1e13, "data sheet")))
    1,500 tokens/s, 75% of slots real, 15.0% of peak
    """

    work: Work
    seconds: float
    peak: Peak

    @property
    def tokens_per_second(self) -> float:
        return self.work.tokens / self.seconds

    @property
    def share_of_slots(self) -> float:
        """That hold a real token."""
        return self.work.tokens / self.work.slots

    @property
    def share_of_peak(self) -> float:
        return self.work.flops / self.seconds / self.peak.flops

    def numbers(self) -> dict[str, float]:
        """By name, for curves."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "share_of_slots": self.share_of_slots,
            "share_of_peak": self.share_of_peak,
        }

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:,.0f} tokens/s, {self.share_of_slots:.0%} of slots real,"
            f" {self.share_of_peak:.1%} of peak"
        )


def peak() -> Peak:
    """Of the devices of `jax.set_mesh`, or of one."""
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.devices()[0]
    one = _of_device(device.device_kind, device.platform)
    if mesh.size <= 1:
        return one
    return Peak(mesh.size * one.flops, f"{mesh.size} times: {one.source}")


@functools.cache
def _of_device(kind: str, platform: str) -> Peak:
    for pattern, flops in _DATA_SHEETS:
        if re.search(pattern, kind, re.IGNORECASE):
            return Peak(flops, f"{kind}, data sheet, dense bf16")
    size, dtype = (1024, jnp.float32) if platform == "cpu" else (8192, jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size), dtype)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return Peak(2 * size**3 / min(seconds), f"{kind}, measured: {size} x {size} in {x.dtype}")
