"""From counts to seconds: the roofline, and what a whole experiment adds up to.

A program's time is at least that of its arithmetic at the chip's peak, and at least that of its
reading and writing at the memory's bandwidth; bytes over the interconnect are added, as if nothing
hid them. Nothing here was measured.
"""

from __future__ import annotations

import dataclasses
import math

from experiments.plan.chips import Chip


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does; adds up, and can be repeated.

    >>> (Work(2.0, 3.0) + 2 * Work(1.0, 0.0, 5.0)).flops
    4.0

    Attributes:
      flops: floating-point operations.
      memory: bytes read and written.
      sent: bytes over the interconnect.
    """

    flops: float = 0.0
    memory: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.memory + other.memory, self.sent + other.sent)

    def __sub__(self, other: Work) -> Work:
        return self + -1 * other

    def __rmul__(self, times: float) -> Work:
        return Work(times * self.flops, times * self.memory, times * self.sent)

    def seconds(self, chip: Chip) -> float:
        """At the speeds of the data sheet.

        >>> from experiments.plan.chips import chip_of
        >>> Work(918e12, 164e9, 200e9).seconds(chip_of("TPU v6e"))
        2.0
        """
        on_chip = max(self.flops / chip.flops, self.memory / chip.bandwidth)
        return on_chip + self.sent / chip.interconnect

    def bound(self, chip: Chip) -> str:
        """What takes longest."""
        times = {
            "arithmetic": self.flops / chip.flops,
            "memory": self.memory / chip.bandwidth,
            "interconnect": self.sent / chip.interconnect,
        }
        return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True)
class SearchWork:
    """What the parts of searches and fits do on a device.

    Attributes:
      prefill: of the policy, a batch of prompts.
      token: one step of the policy for all candidates, half of the answer being there.
      commit: the policy's caches for the next beams.
      sample: one step of plain sampling.
      value_prefill, value_chunk, value_commit: of one value network. They are nothing for heads on
        the policy.
      gradient: of one part of a batch.
      optimizer: what an update does beside.
    """

    prefill: Work
    token: Work
    commit: Work
    sample: Work
    value_prefill: Work = Work()
    value_chunk: Work = Work()
    value_commit: Work = Work()
    gradient: Work = Work()
    optimizer: Work = Work()

    def prefill_seconds(self, networks: int, chip: Chip) -> float:
        return self.prefill.seconds(chip) + networks * self.value_prefill.seconds(chip)

    def chunk_seconds(self, length: int, networks: int, chip: Chip) -> float:
        """One beam step of `length` tokens, read by so many value networks."""
        values = self.value_chunk.seconds(chip) + self.value_commit.seconds(chip)
        of_policy = length * self.token.seconds(chip) + self.commit.seconds(chip)
        return of_policy + networks * values

    def search_seconds(self, tokens: int, length: int, networks: int, chip: Chip) -> float:
        """A batch of guided answers of so many tokens."""
        steps = math.ceil(tokens / length)
        return self.prefill_seconds(networks, chip) + steps * self.chunk_seconds(
            length, networks, chip
        )

    def sampling_seconds(self, tokens: int, chip: Chip) -> float:
        """A batch of answers of so many tokens without guidance."""
        return self.prefill.seconds(chip) + tokens * self.sample.seconds(chip)

    def update_seconds(self, parts: int, chip: Chip) -> float:
        """An update of the value network from a batch in so many parts."""
        return parts * self.gradient.seconds(chip) + self.optimizer.seconds(chip)


@dataclasses.dataclass(frozen=True)
class Line:
    """One stage of an experiment.

    Attributes:
      stage: what it is.
      units: how many calls of a program it takes.
      seconds: of one of them.
    """

    stage: str
    units: float
    seconds: float

    def hours(self, num_devices: int) -> float:
        """Device hours."""
        return self.units * self.seconds * num_devices / 3600


def largest_batch(
    sizes: tuple[int, int], used: tuple[float, float], limit: float, multiple: int
) -> int:
    """The most prompts that fit, by the line through two of the compiler's plans.

    >>> largest_batch((16, 32), (20.0, 30.0), 95.0, 4)
    136

    Args:
      sizes: prompts of two compiled programs.
      used: bytes a device of both.
      limit: bytes that a device has.
      multiple: in which prompts are shared evenly.

    Returns:
      A multiple of `multiple`; 0 if not even that many fit.
    """
    slope = (used[1] - used[0]) / (sizes[1] - sizes[0])
    if slope <= 0:
        raise ValueError(f"More prompts must take more memory. Got: {used} for {sizes}")
    base = used[0] - slope * sizes[0]
    return max(0, math.floor((limit - base) / slope / multiple) * multiple)
