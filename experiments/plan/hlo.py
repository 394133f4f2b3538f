"""Collectives of a compiled program, read from its HLO text.

A program on N devices is one text, which every device runs on its part: shapes are those of a
device. Loops are followed, so that it is known of every collective which loops it is in and how
often they turn, where the compiler knows that.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_ALL = re.compile(r"replica_groups=\{\}")
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      name: of the instruction.
      shape: of its result on a device, as the text has it.
      size: bytes of that.
      group: numbers of the devices of the first group that takes part together.
      loops: the bodies of the loops that it is in, from the outside.
      turns: of all of these loops together; None where the compiler does not know one.
    """

    kind: str
    name: str
    shape: str
    size: int
    group: tuple[int, ...]
    loops: tuple[str, ...] = ()
    turns: int | None = 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends, in rings.

        >>> Collective("all-reduce", "x", "f32[2]", 8, (0, 1, 2, 3)).sent
        12.0
        """
        others = len(self.group) - 1
        if self.kind == "all-reduce":
            return 2 * self.size * others / len(self.group)
        if self.kind == "reduce-scatter":
            return float(self.size * others)
        if self.kind in ("all-gather", "all-to-all"):
            return self.size * others / len(self.group)
        return float(self.size)

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh that it goes along: in which the members of a group differ."""
        sizes = tuple(mesh_shape.values())
        places = [_place(device, sizes) for device in self.group]
        return tuple(
            axis
            for axis, along in zip(mesh_shape, zip(*places, strict=True), strict=True)
            if len(set(along)) > 1
        )


def collectives(text: str) -> list[Collective]:
    """Of a whole program. Those among a single device are left out."""
    entry, computations = _computations(text)
    partitions = _PARTITIONS.search(text)
    everybody = tuple(range(int(partitions[1]) if partitions else 1))
    found = (
        dataclasses.replace(one, group=one.group or everybody)
        for one in _walk(entry, computations, (), 1)
    )
    return [one for one in found if len(one.group) > 1]


def shape_bytes(type_text: str) -> list[int]:
    """Bytes of every array in the type of a result.

    >>> shape_bytes("(bf16[8,128]{1,0:T(8,128)(2,1)}, u32[])")
    [2048, 4]
    """
    return [
        math.prod(int(size) for size in sizes.split(",") if size) * _bits(kind) // 8
        for kind, sizes in _SHAPE.findall(type_text)
    ]


def _bits(kind: str) -> int:
    found = _BITS.search(kind)
    return int(found[0]) if found else 8


def _computations(text: str) -> tuple[str, dict[str, list[re.Match[str]]]]:
    """The entry's name, and the instructions of every computation."""
    found: dict[str, list[re.Match[str]]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append(instruction)
    if not entry:
        raise ValueError(f"The text of a program has an ENTRY. Got: {text[:80]!r}")
    return entry, found


def _walk(
    name: str,
    computations: Mapping[str, Sequence[re.Match[str]]],
    loops: tuple[str, ...],
    turns: int | None,
) -> Iterator[Collective]:
    scattered = name.lstrip("%").startswith("all-reduce-scatter")
    for instruction in computations[name]:
        operation, rest = instruction[3], instruction[4]
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            found = _collective(kind, instruction, loops, turns)
            # What XLA on TPU calls so is a reduction of which each device keeps its share.
            if scattered and kind == "all-reduce":
                share = found.size // max(len(found.group), 1)
                found = dataclasses.replace(found, kind="reduce-scatter", size=share)
            yield found
        body = _BODY.search(rest)
        for one, several in _CALLED.findall(rest):
            for called in [one] if one else re.findall(r"%?([\w.-]+)", several):
                if called not in computations or operation in ("reduce", "all-reduce"):
                    continue
                if operation == "while" and body and called == body[1]:
                    known = _TRIPS.search(rest)
                    together = turns * int(known[1]) if turns and known else None
                    yield from _walk(called, computations, (*loops, called), together)
                else:
                    yield from _walk(called, computations, loops, turns)


def _collective(
    kind: str, instruction: re.Match[str], loops: tuple[str, ...], turns: int | None
) -> Collective:
    name, result, operation, rest = instruction.groups()
    shapes, sizes = _SHAPE.findall(result), shape_bytes(result)
    chosen = slice(None)
    if operation == "all-gather-start":  # (operands, results)
        chosen = slice(len(sizes) // 2, None)
    elif operation == "collective-permute-start":  # (operand, result, contexts)
        chosen = slice(1, 2)
    texts = [f"{kind_}[{shape}]" for kind_, shape in shapes[chosen]]
    return Collective(kind, name, ", ".join(texts), sum(sizes[chosen]), _group(rest), loops, turns)


def _group(rest: str) -> tuple[int, ...]:
    """The first group of devices; nobody where all of them are one."""
    if listed := _LISTED.search(rest):
        return tuple(map(int, listed[1].split(",")))
    if pair := _PAIRS.search(rest):
        return tuple(map(int, pair.groups()))
    if iota := _IOTA.search(rest):
        groups, shape, order = iota.groups()
        return _iota(shape, order)[: math.prod(_numbers(groups)[1:])]
    if mesh := _MESH.search(rest):
        return _mesh_group(*mesh.groups())
    if _ALL.search(rest):
        return ()
    raise ValueError(f"Groups of devices in a form that is not known. Got: {rest[:200]}")


def _iota(shape: str, order: str | None) -> tuple[int, ...]:
    """`[shape]T(order)`: numbers counted through an array, read in another order of its axes."""
    sizes = _numbers(shape)
    axes = list(range(len(sizes))) if order is None else _numbers(order)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    permuted = tuple(sizes[axis] for axis in axes)
    return tuple(
        sum(place * strides[axis] for place, axis in zip(_place(i, permuted), axes, strict=True))
        for i in range(math.prod(sizes))
    )


def _mesh_group(axes: str, shape: str | None, order: str | None, along: str) -> tuple[int, ...]:
    """The first group of `mesh['x'=4,'y'=2] {'y'}`: together along an axis, or a part of one.

    `'x':(2)2` is the part of `x` that has two steps, within each of two halves.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    number = math.prod(sizes.values())
    devices = _iota(shape or str(number), order)
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)

    def is_first(index: int) -> bool:
        places = dict(zip(sizes, _place(index, tuple(sizes.values())), strict=True))
        for name, before, size in parts:
            step = sizes[name] // (int(before) * int(size)) if before else 1
            places[name] -= places[name] // step % int(size or sizes[name]) * step
        return not any(places.values())

    return tuple(devices[index] for index in range(number) if is_first(index))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _place(index: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Of a number counted through an array of these sizes, the last axis fastest."""
    places = []
    for size in reversed(sizes):
        index, place = divmod(index, size)
        places.append(place)
    return tuple(reversed(places))
