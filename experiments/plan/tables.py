"""The tables that the planner prints, in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from experiments.plan.chips import Chip, Topology
from experiments.plan.estimate import Line, SearchWork, Work
from experiments.plan.experiment import Experiment
from experiments.plan.hlo import collectives
from experiments.plan.plan import Largest, Need, largest_gather, passes
from experiments.plan.programs import Program
from iro_jax.evaluation import markdown_table

_GB = 1e9


def held_table(held: Mapping[str, int], chip: Chip) -> str:
    """Weights, caches and state of a guided search on a device."""
    rows = [(name, f"{size / _GB:.3f}", f"{size / chip.memory:.1%}") for name, size in held.items()]
    total = sum(held.values())
    rows.append(("together", f"{total / _GB:.3f}", f"{total / chip.memory:.1%}"))
    return markdown_table(("on each device", "GB", "of its memory"), rows)


def needs_table(needs: Sequence[Need], chip: Chip) -> str:
    """Memory of every program, and whether it fits."""
    rows = [
        (
            need.name,
            f"{need.resident / _GB:.2f}",
            "not compiled" if need.extra is None else f"{need.extra / _GB:.2f}",
            f"{need.total / _GB:.2f}",
            f"{need.total / chip.memory:.0%}",
            "yes" if need.total <= chip.memory else "NO",
            f"{need.seconds:.0f}",
        )
        for need in needs
    ]
    header = ("program", "held GB", "temporaries GB", "GB", "of memory", "fits", "compiled in s")
    return markdown_table(header, rows)


def largest_table(found: Sequence[Largest]) -> str:
    rows = [
        (
            one.kind,
            str(one.size),
            "no room" if one.need is None else f"{one.need / _GB:.2f}",
        )
        for one in found
    ]
    return markdown_table(("largest batch", "together", "GB with so many"), rows)


def collectives_table(compiled: Sequence[tuple[Sequence[Program], Mesh]]) -> str:
    """By program, kind, axes and depth of loops: how many, and bytes."""
    rows = []
    for program, mesh in ((program, mesh) for programs, mesh in compiled for program in programs):
        groups = defaultdict(list)
        for found in collectives(program.text):
            turns = "once" if not found.loops else "a turn" if found.turns is None else "a call"
            groups[found.kind, " x ".join(found.axes(dict(mesh.shape))), turns].append(found)
        for (kind, axes, turns), some in sorted(groups.items()):
            known = [found.turns or 1 for found in some]
            sent = sum(n * found.sent for n, found in zip(known, some, strict=True))
            largest = max(some, key=lambda found: found.size)
            rows.append(
                (
                    program.name,
                    kind,
                    axes,
                    turns,
                    str(sum(known)),
                    f"{sent / 1e6:.3f}",
                    largest.shape if len(largest.shape) < 40 else f"{largest.shape[:36]} ...",
                )
            )
    header = ("program", "collective", "along", "how often", "of them", "MB sent", "the largest")
    return markdown_table(header, rows)


def gathers_line(programs: Sequence[Program], whole: Mapping[str, int]) -> str:
    """What is gathered at most, beside what must not be."""
    largest = [(p.name, found) for p in programs if (found := largest_gather(p))]
    limits = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in whole.items())
    if not largest:
        return f"Nothing is gathered. Whole would be: {limits}."
    name, most = max(largest, key=lambda pair: pair[1].size)
    return (
        f"The largest gather of a search is {most.shape} in {name!r}, {most.size / 1e6:,.3f} MB;"
        f" whole would be: {limits}."
    )


def work_table(work: SearchWork, experiment: Experiment, chip: Chip) -> str:
    """FLOPs, bytes and roofline time of the parts of a run."""
    length = experiment.search.chunk_length
    named: dict[str, Work] = {
        "prefill, policy": work.prefill,
        "one token of all candidates": work.token,
        "policy's caches of the next beams": work.commit,
    }
    if passes(experiment, 1):
        named |= {
            "prefill, a value network": work.value_prefill,
            f"a chunk of {length}, a value network": work.value_chunk,
            "its caches of the next beams": work.value_commit,
        }
    named |= {
        "one token, plain sampling": work.sample,
        "gradient of a part of a batch": work.gradient,
        "the rest of an update": work.optimizer,
    }
    rows = [
        (
            name,
            f"{some.flops / 1e9:,.1f}",
            f"{some.memory / _GB:,.3f}",
            f"{some.sent / 1e6:,.2f}",
            f"{1e3 * some.seconds(chip):,.3f}",
            some.bound(chip),
        )
        for name, some in named.items()
    ]
    header = ("on each device", "GFLOP", "GB", "MB sent", "ms by roofline", "bound by")
    return markdown_table(header, rows)


def answers_table(
    work: SearchWork, experiment: Experiment, prompts: int, topology: Topology
) -> str:
    """Answers an hour, for every number of value functions that a run searches with."""
    chosen, tokens, chip = experiment.search, experiment.answer_tokens, topology.chip
    rows = []
    for count in range(experiment.num_iterations + 1):
        if count:
            networks = passes(experiment, count)
            each = work.search_seconds(tokens, chosen.chunk_length, networks, chip)
        else:
            each = work.sampling_seconds(tokens, chip)
        name = f"guided by {count}" if count else f"{chosen.num_candidates} samples a prompt"
        rows.append((name, _number(each), f"{3600 * prompts / each:,.0f}"))
    header = ("search", f"seconds for {prompts} prompts", "answers an hour")
    return markdown_table(header, rows)


def stages_table(lines: Sequence[Line], topology: Topology) -> str:
    number = topology.num_devices
    rows = [
        (line.stage, f"{line.units:,.0f}", _number(line.seconds), _number(line.hours(number)))
        for line in lines
    ]
    total = sum(line.hours(number) for line in lines)
    rows.append(("together", "", "", _number(total)))
    return markdown_table(("stage", "calls", "seconds each", "device hours"), rows)


def _number(x: float) -> str:
    """With three digits, or all those before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
