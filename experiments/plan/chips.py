"""What an accelerator's data sheet says: memory, bandwidths, arithmetic.

The one table of chips of the planner and of the benchmarks. `iro_jax.models.throughput` knows the
arithmetic too, because the library measures itself against it; a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      name: short, as in `--topology`.
      kinds: a pattern of what JAX calls it, its `device_kind`.
      memory: bytes that programs can have.
      bandwidth: of its memory, bytes a second.
      flops: dense bf16, a second.
      interconnect: bytes a second that it can send, over all of its links to others.
      source: where the numbers are from.
      devices: that libtpu plans for on one chip; each has its share of all of this.
    """

    name: str
    kinds: str
    memory: float
    bandwidth: float
    flops: float
    interconnect: float
    source: str
    devices: int = 1

    @property
    def device(self) -> Chip:
        """What one of its devices has."""
        shared = {
            name: getattr(self, name) / self.devices
            for name in ("memory", "bandwidth", "flops", "interconnect")
        }
        return dataclasses.replace(self, **shared, devices=1)


_GIB = 2.0**30
_TPU = "Google Cloud, TPU system architecture"
_NVIDIA = "NVIDIA data sheet"

# Memory of TPUs is what libtpu 0.0.52 leaves to programs (it says so where one is too large), a
# little less than on the data sheets. Interconnects of TPUs are given in both directions together,
# NVLink's too: half of it is sent.
CHIPS = (
    Chip("v4", r"^TPU v4\b", 30.5 * _GIB, 1228e9, 275e12, 150e9, f"{_TPU}, v4", devices=2),
    Chip("v5e", r"^TPU v5( lite|e)\b", 15.75 * _GIB, 819e9, 197e12, 100e9, f"{_TPU}, v5e"),
    Chip("v5p", r"^TPU v5p?\b", 95.73 * _GIB, 2765e9, 459e12, 300e9, f"{_TPU}, v5p"),
    Chip("v6e", r"^TPU v6( lite|e)\b", 31.24 * _GIB, 1640e9, 918e12, 200e9, f"{_TPU}, v6e"),
    Chip("a100", r"A100.*80GB", 80e9, 2039e9, 312e12, 300e9, f"{_NVIDIA}, A100 80GB SXM"),
    Chip(
        "h100",
        r"H100 80GB HBM3|H100 SXM",
        80e9,
        3350e9,
        989e12,
        450e9,
        f"{_NVIDIA}, H100 SXM",
    ),
    Chip("h200", r"\bH200\b", 141e9, 4800e9, 989e12, 450e9, f"{_NVIDIA}, H200 SXM"),
    Chip("l4", r"\bL4\b", 24e9, 300e9, 121e12, 32e9, f"{_NVIDIA}, L4 (PCIe 4.0 x16)"),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that a program is planned for.

    Attributes:
      name: as it was given, such as `v5p:2x2x4` or `gpu:h100x8`.
      chip: what each of them has.
      num_devices: how many.
      host_devices: how many of them one host has.
    """

    name: str
    chip: Chip
    num_devices: int
    host_devices: int

    @property
    def is_tpu(self) -> bool:
        """Whether there is a compiler for it that needs no such device."""
        return not self.name.startswith("gpu:")


def chip_of(kind: str) -> Chip | None:
    """The chip that JAX calls `kind`; None if the table does not have it.

    >>> chip_of("NVIDIA H100 80GB HBM3").name
    'h100'
    """
    return next((chip for chip in CHIPS if re.search(chip.kinds, kind)), None)


def parse_topology(name: str) -> Topology:
    """Of a TPU slice (`v5p:2x2x4`, chips along each axis) or of GPUs (`gpu:h100x8`).

    Raises:
      ValueError: it is neither, or the chip is not in the table.
    """
    gpus = re.fullmatch(r"gpu:([a-z0-9]+?)(?:x(\d+))?", name)
    tpus = re.fullmatch(r"(v\w+):(\d+(?:x\d+)*)", name)
    match = gpus or tpus
    chip = next((chip for chip in CHIPS if match and chip.name == match[1]), None)
    if match is None or chip is None or chip.name.startswith("v") != bool(tpus):
        known = ", ".join(chip.name for chip in CHIPS)
        raise ValueError(
            "A topology is a TPU slice such as v5p:2x2x4 or GPUs such as gpu:h100x8, of one of the"
            f" chips {known}. Got: {name!r}"
        )
    number = math.prod(map(int, (match[2] or "1").split("x")))
    # Eight chips of the small TPUs are one host; larger slices, and the large TPUs, have four.
    most = 8 if gpus or (chip.name in ("v5e", "v6e") and number <= 8) else 4
    if number > most and number % most:
        raise ValueError(f"Hosts of {name} have {most} chips each. Got: {number} chips")
    of_host = min(number, most)
    return Topology(name, chip.device, number * chip.devices, of_host * chip.devices)
