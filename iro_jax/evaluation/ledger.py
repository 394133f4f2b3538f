"""The cost ledger, `cost.jsonl`: what every unit of work of a run has cost.

One line of JSON for each unit (a shard of rollouts, a fit, an evaluation) of each stage. Lines
are only ever appended, each in one write that is on disk before `append` returns, so that a
process may be killed at any moment: a torn last line is left out when reading and cut off by the
next append. Work that is done again after a kill appends again, and its last entry counts, with
the longest of its times: a stage that was nearly done finds most of it on disk.
Append a unit's entry before marking the unit as done; then nothing that is done lacks its cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from iro_jax.files import sync

Phase = Literal["training", "inference"]
"""What a cost is for: making value functions, or answering with them."""


class LedgerError(ValueError):
    """A ledger holds a line that is no entry; the message names file and line."""


@dataclasses.dataclass
class Cost:
    """What some work has cost. Costs add up, except that of the memory the highest counts.

    Attributes:
      tokens_sampled: by the policy.
      tokens_read: that networks read without sampling them: prompts, and what value functions
        and reward models read; each network on its own.
      value_queries: candidates scored, times value functions asked.
      reward_queries: complete answers scored.
      policy_flops, value_flops, reward_flops: of matrix products; see `flops`.
      seconds: wall-clock.
      compile_seconds: of these, XLA's compilations, or their retrieval from its cache.
      peak_memory_bytes: highest of the process so far, of the fullest accelerator or else of the
        host; 0 where the platform does not tell.
    """

    tokens_sampled: int = 0
    tokens_read: int = 0
    value_queries: int = 0
    reward_queries: int = 0
    policy_flops: float = 0.0
    value_flops: float = 0.0
    reward_flops: float = 0.0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    peak_memory_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        total = dataclasses.replace(self)
        total += other
        return total

    def __iadd__(self, other: Cost) -> Cost:
        peak = max(self.peak_memory_bytes, other.peak_memory_bytes)
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        self.peak_memory_bytes = peak
        return self


@dataclasses.dataclass(frozen=True)
class Entry:
    """The cost of one unit of a stage, and the devices that it ran on."""

    stage: str
    unit: int | str
    phase: Phase
    device: str
    cost: Cost

    def to_json(self) -> dict[str, Any]:
        """One flat dictionary, a line of the ledger."""
        names = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del names["cost"]
        return names | dataclasses.asdict(self.cost)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Entry:
        """The inverse of `to_json`; names that are not known any more raise a `TypeError`."""
        own = {field.name for field in dataclasses.fields(cls)} - {"cost"}
        cost = Cost(**{name: x for name, x in fields.items() if name not in own})
        return cls(**{name: x for name, x in fields.items() if name in own}, cost=cost)


class Ledger:
    """An append-only file of entries. One process writes; any number may read meanwhile.

    Where several hosts run together, each but the first has a file of its own beside it,
    `cost-1.jsonl` and so on. What all of them have done together counts once.
    """

    def __init__(self, path: str | os.PathLike[str], host: int = 0):
        """The ledger at `path`; the file appears with its first entry.

        Args:
          host: the number of this one.

        Raises:
          LedgerError: a line is no entry.
        """
        shared = Path(path)
        self.path = shared if host == 0 else shared.with_stem(f"{shared.stem}-{host}")
        self._shared = shared
        self.entries()

    def entries(self) -> list[Entry]:
        """The entry of each unit of each stage, in the order of their first ones.

        Raises:
          LedgerError: a line is no entry.
        """
        latest: dict[tuple[str, int | str], Entry] = {}
        others = self._shared.parent.glob(f"{self._shared.stem}-*{self._shared.suffix}")
        for path in (self._shared, *sorted(others)):
            if path.exists():
                self._read(path, latest)
        return list(latest.values())

    @staticmethod
    def _read(path: Path, latest: dict[tuple[str, int | str], Entry]) -> None:
        # What follows the last line break is a write that a kill has interrupted.
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                entry = Entry.from_json(json.loads(line))
            except (ValueError, TypeError, AttributeError) as error:
                raise LedgerError(
                    f"{path}, line {number}: expected an entry of the cost ledger, one JSON"
                    f" object a line ({error}). Got: {line[:80].decode(errors='replace')}"
                ) from error
            before = latest.get((entry.stage, entry.unit))
            latest[entry.stage, entry.unit] = entry if before is None else _again(before, entry)

    def totals(self, phase: Phase | None = None, stage: str | None = None) -> Cost:
        """The sum over units, of one phase or stage or of all; each unit counts once."""
        total = Cost()
        for entry in self.entries():
            if phase in (None, entry.phase) and stage in (None, entry.stage):
                total += entry.cost
        return total

    def append(self, entry: Entry) -> None:
        """Adds an entry; it is on disk when this returns.

        Raises:
          ValueError: an unknown phase.
          OSError: the disk is full or the file cannot be written; what was stored stays.
        """
        if entry.phase not in get_args(Phase):
            raise ValueError(f"phase must be one of {get_args(Phase)}. Got: {entry.phase!r}")
        line = json.dumps(entry.to_json(), allow_nan=False, default=_number).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with open(self.path, "ab+", buffering=0) as file:
            end = _end_of_lines(file)
            file.truncate(end)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise OSError(
                    error.errno,
                    f"{self.path}: the cost of stage {entry.stage!r}, unit {entry.unit!r}, could"
                    f" not be written; all earlier entries are kept. Got: {error.strerror}",
                ) from error
        if new:
            sync(self.path.parent)

    @contextlib.contextmanager
    def measure(self, stage: str, unit: int | str, phase: Phase) -> Iterator[Cost]:
        """Measures the body and appends its cost; if the body fails, nothing is appended.

        Yields a `Cost` for the body to add its counts to. Seconds, compilation and memory are
        filled in at the end. JAX returns before its devices are done: the body has to wait for its
        results (`jax.block_until_ready`) to be billed for them. What other threads compile in the
        meantime is billed too.
        """
        cost = Cost()
        compiled, start = compile_seconds(), time.perf_counter()
        yield cost
        cost.seconds = time.perf_counter() - start
        cost.compile_seconds = compile_seconds() - compiled
        cost.peak_memory_bytes = peak_memory_bytes()
        self.append(Entry(stage, unit, phase, device_name(), cost))


def _again(before: Entry, after: Entry) -> Entry:
    """The entry of work that was done again: the later counts, the longer times."""
    longest = {
        name: max(getattr(before.cost, name), getattr(after.cost, name))
        for name in ("seconds", "compile_seconds", "peak_memory_bytes")
    }
    return dataclasses.replace(after, cost=dataclasses.replace(after.cost, **longest))


def compile_seconds() -> float:
    """Seconds that XLA has compiled in this process since the first call of this function.

    Counted from JAX's own events; tracing and lowering are not in it, because they are nested and
    would count twice. Stays 0 with a version of JAX that does not report compilations.
    """
    return _compile_clock().seconds


class _CompileClock:
    """Adds up the compilations that JAX reports."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        # "/jax/core/compile/backend_compile_duration" in JAX 0.4 to 0.12.
        if event.startswith("/jax/core/compile/") and "backend_compile" in event:
            self.seconds += duration_secs


@functools.cache
def _compile_clock() -> _CompileClock:
    # Registered once and never taken back: JAX has not always offered to.
    clock = _CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock)
    return clock


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the fullest accelerator, or of this process on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(found["peak_bytes_in_use"]) for found in stats if "peak_bytes_in_use" in found]
    if peaks:
        return max(peaks)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_name() -> str:
    """The devices of this run, such as `1 x cpu`."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _number(x: Any) -> int | float:
    """Scalars of numpy and JAX as Python's."""
    return x.item()


def _end_of_lines(file: FileIO) -> int:
    """Where the last whole line ends, in bytes."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1
