"""What a run would take on devices that are not there.

    python -m experiments.plan --config=configs/ultrafeedback.py:70b --topology=v5p:2x2x4
    python -m experiments.plan --config=configs/ultrafeedback.py --topology=gpu:h100x8

Needs no weights and no accelerator: for TPUs the run's own programs are compiled by libtpu
(`pip install libtpu`), for GPUs they are counted by hand. `--layers=4` cuts every network to four
layers, which compiles in minutes.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import logging
import math
import os

import jax
from absl import app, flags
from ml_collections import ConfigDict

from experiments import command
from experiments.plan import tables
from experiments.plan.by_hand import counted_work
from experiments.plan.chips import Topology, parse_topology
from experiments.plan.counts import compiled_work
from experiments.plan.estimate import SearchWork
from experiments.plan.experiment import Experiment, describe
from experiments.plan.placing import Places, places_of
from experiments.plan.plan import (
    Need,
    held_bytes,
    largest_batches,
    search_needs,
    stages,
    update_need,
    whole_bytes,
)
from experiments.plan.programs import Program, TooLargeError

_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5p:2x2x4 or gpu:h100x8.")
_LAYERS = flags.DEFINE_integer("layers", None, "Of every network, instead of all.")
_PROMPT = flags.DEFINE_integer("prompt_tokens", None, "Longest prompt; 512 if the config is open.")
_ANSWER = flags.DEFINE_integer("answer_tokens", None, "Expected of an answer; by default all.")
_LARGEST = flags.DEFINE_bool("largest", True, "Whether to look for the largest batches.")


def plan_tpu(
    experiment: Experiment, topology: Topology, places: Places, prompts: int, *, largest: bool
) -> None:
    """Compiles, and prints."""
    chip = topology.chip
    mesh = places.own
    print("## Memory of a device\n\nShapes and shardings of the programs' arguments:\n")
    print(tables.held_table(held_bytes(experiment, mesh, prompts), chip))
    print("\nPlans of the compiler, beside what is held (the fit beside the policy):\n", flush=True)
    programs: list[Program] = []
    needs: dict[bool | None, list[Need]] = {}
    for guided in (True, False, None):
        try:
            if guided is None:
                need, program = update_need(experiment, places)
                of_kind, compiled = [need], [program]
            else:
                of_kind, compiled = search_needs(experiment, mesh, prompts, guided=guided)
        except TooLargeError as error:
            print(f"Does not fit: {error}\n", flush=True)
            continue
        needs[guided] = of_kind
        programs += compiled
    print(tables.needs_table([need for some in needs.values() for need in some], chip), flush=True)
    if largest:
        known = {
            guided: (prompts, max(need.total for need in needs[guided]))
            for guided in (True, False)
            if guided in needs
        }
        found = largest_batches(experiment, places, chip.memory, known)
        print(f"\n{tables.largest_table(found)}\n")
    print("\n## Collectives of the compiled programs\n")
    searching = [program for program in programs if program.name != "value update"]
    fits = [program for program in programs if program not in searching]
    print(tables.collectives_table([(searching, mesh), (fits, places.mesh)]))
    whole = whole_bytes(experiment, mesh, prompts)
    print(f"\n{tables.gathers_line(searching, whole)}", flush=True)
    work = compiled_work(experiment, places, prompts)
    source = "Counted by the compiler in programs without loops, at two depths, and continued."
    print_times(experiment, topology, prompts * places.num_hosts, work, source)


def plan_gpu(experiment: Experiment, topology: Topology, places: Places, prompts: int) -> None:
    """Counts by hand, and prints."""
    chip = topology.chip
    print("## Memory of a device\n\nBy shapes and shardings; temporaries are not known:\n")
    held = held_bytes(experiment, places.own, prompts)
    print(tables.held_table(held, chip))
    fits = sum(held.values()) <= chip.memory
    print(f"\nWithout temporaries it {'fits' if fits else 'does NOT fit'}.")
    work = counted_work(experiment, places, prompts)
    print_times(
        experiment,
        topology,
        prompts * places.num_hosts,
        work,
        "Counted by hand; nothing was compiled.",
    )


def print_times(
    experiment: Experiment, topology: Topology, prompts: int, work: SearchWork, source: str
) -> None:
    print(f"\n## Work\n\n{source} Times are estimates by the roofline of {topology.chip.source}.\n")
    print(tables.work_table(work, experiment, topology.chip))
    print("\n## Estimated answers an hour\n")
    print(tables.answers_table(work, experiment, prompts, topology))
    print("\n## Estimated device hours\n")
    print(tables.stages_table(stages(experiment, work, topology, prompts), topology))


def title(experiment: Experiment, topology: Topology, places: Places, prompts: int) -> str:
    """What is planned, when, and with which versions."""
    sizes = dict(places.mesh.shape)
    axes = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    chosen, value = experiment.search, experiment.value.network.config
    values = "heads on the policy" if experiment.on_policy else f"{value.num_layers} layers"
    versions = [f"JAX {jax.__version__}"]
    if topology.is_tpu:
        versions.append(f"libtpu {importlib.metadata.version('libtpu')}")
    return (
        f"# {experiment.name} on {topology.name}\n\n"
        f"{datetime.date.today()}, {', '.join(versions)}. {topology.num_devices} devices on"
        f" {places.num_hosts} hosts, {axes}."
        f" Policy of {experiment.policy.config.num_layers} layers,"
        f" {experiment.num_iterations} value functions ({values}"
        f"{', another tokenizer' if experiment.foreign else ''}). A host searches"
        f" {prompts} prompts of {experiment.prompt_tokens} slots together, K={chosen.beam_width},"
        f" B={chosen.num_successors}, L={chosen.chunk_length}, at most"
        f" {chosen.max_new_tokens} new tokens, {experiment.answer_tokens} expected.\n"
    )


def run(config: ConfigDict, topology: Topology) -> None:
    """Plans a configuration."""
    experiment = describe(config, prompt_tokens=_PROMPT.value, answer_tokens=_ANSWER.value)
    if _LAYERS.value is not None:
        experiment = experiment.truncated(_LAYERS.value)
    asked = experiment.mesh["model"]
    if topology.host_devices % asked:
        model = math.gcd(topology.host_devices, asked)
        experiment = dataclasses.replace(experiment, mesh={**experiment.mesh, "model": model})
        print(
            f"A run would refuse mesh.model={asked}: a network lies on one host, which has"
            f" {topology.host_devices} devices here. Planned with --config.mesh.model={model}.\n"
        )
    places = places_of(topology, experiment.mesh)
    prompts = -(-experiment.search.batch_size // places.shares) * places.shares
    print(title(experiment, topology, places, prompts), flush=True)
    if topology.is_tpu:
        plan_tpu(experiment, topology, places, prompts, largest=_LARGEST.value)
    else:
        plan_gpu(experiment, topology, places, prompts)


def main(argv: list[str]) -> None:
    # libtpu asks a cloud machine's metadata server for its devices, which nobody needs here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # What is compiled for other devices is of no use to a run here.
    jax.config.update("jax_enable_compilation_cache", False)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with command.started(argv):
        assert _TOPOLOGY.value is not None
        run(command.CONFIG.value, parse_topology(_TOPOLOGY.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("topology")
    app.run(main, flags_parser=command.parse_flags)
