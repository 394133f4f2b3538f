"""Weak scaling on paper: what each chip sends in a step, from 4 chips to 256.

    python -m experiments.plan.weak_scaling --config=configs/ultrafeedback.py:70b

Four layers of every network, so many prompts and rollouts a device, a mesh that grows along `data`
while `model` stays. Programs are compiled for every slice; bytes are those of their collectives. A
search step is one token of all candidates, and the values and the selection behind a chunk, with
one value function.

Expected: a search sends nothing along `data` but flags of a few bytes. A fit sums its gradients
there, for which a chip of n sends 2 (n - 1) / n times its part of them: flat from some chips on.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
from collections.abc import Iterator

import jax
from absl import app, flags

from experiments import command
from experiments.plan.experiment import Experiment, describe
from experiments.plan.fits import Update
from experiments.plan.hlo import collectives
from experiments.plan.placing import mesh_of, tpu_devices
from experiments.plan.programs import Program, Search
from iro_jax.evaluation import markdown_table

_SLICES = flags.DEFINE_list(
    "topologies", ["v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8"], "From small to large."
)
_MODEL = flags.DEFINE_integer("model", 4, "Devices that share a network.")
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share what a fit trains.")
_LAYERS = flags.DEFINE_integer("layers", 4, "Of every network.")
_PROMPTS = flags.DEFINE_integer("prompts", 2, "For each group of devices that share a network.")

HEADER = ("program", "chips", "data", "times", "MB along data", "MB along model", "largest")


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that a chip sends in one call of a program; loops count as one turn.

    Attributes:
      along_batch: to devices with other prompts, along `data` and `fsdp`.
      along_model: to devices with other parts of the same networks.
      largest: the largest array that goes along `data` or `fsdp`.
    """

    along_batch: float
    along_model: float
    largest: str


def sent(program: Program, mesh: dict[str, int]) -> Sent:
    found = collectives(program.text)
    batch = [x for x in found if {"data", "fsdp"} & set(x.axes(mesh))]
    model = [x for x in found if x not in batch]
    largest = max(batch, key=lambda x: x.size).shape if batch else "none"
    return Sent(sum(x.sent for x in batch), sum(x.sent for x in model), largest)


def programs(experiment: Experiment, topology: str, prompts: int) -> Iterator[tuple[Program, dict]]:
    """The steps of a search and of a fit on a slice, with `prompts` for each part of the mesh."""
    mesh = mesh_of(tpu_devices(topology), experiment.mesh)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    search = Search(experiment, mesh, prompts * shares, 1)
    for program in [*search.step(), Update(experiment, mesh, prompts * shares, 1).update()]:
        yield program, dict(mesh.shape)


def main(argv: list[str]) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_enable_compilation_cache", False)
    with command.started(argv):
        experiment = describe(command.CONFIG.value).truncated(_LAYERS.value)
        mesh = {"data": -1, "fsdp": _FSDP.value, "model": _MODEL.value}
        experiment = dataclasses.replace(experiment, mesh=mesh)
        rows: list[tuple[str, ...]] = []
        first: dict[str, float] = {}
        for topology in _SLICES.value:
            for program, shape in programs(experiment, topology, _PROMPTS.value):
                one = sent(program, shape)
                if one.along_batch:
                    first.setdefault(program.name, one.along_batch)
                times = one.along_batch / first.get(program.name, 1.0)
                chips = shape["data"] * shape["fsdp"] * shape["model"]
                shares = chips // shape["model"]
                rows.append(
                    (
                        program.name,
                        str(chips),
                        str(shares),
                        f"{times:.2f}",
                        f"{one.along_batch / 1e6:.6f}",
                        f"{one.along_model / 1e6:.3f}",
                        one.largest if len(one.largest) < 40 else f"{one.largest[:36]} ...",
                    )
                )
                print(*rows[-1], sep="  ", flush=True)
        print(
            f"\n{experiment.name}, {_LAYERS.value} layers, {_PROMPTS.value} prompts and rollouts"
            f" for each {_MODEL.value} chips, fsdp={_FSDP.value}, {datetime.date.today()}, JAX"
            f" {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}\n"
        )
        rows.sort(key=lambda row: row[0])
        print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
