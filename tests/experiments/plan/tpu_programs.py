"""Compiles the paper's searches for TPUs that need not be there, and prints facts as JSON.

Run as a program, since libtpu takes its settings from the environment:

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m tests.experiments.plan.tpu_programs

The shapes are the experiment's own, but for the number of layers.
"""

import json
import sys

import jax

from configs.ultrafeedback import get_config
from experiments.plan.chips import parse_topology
from experiments.plan.experiment import describe
from experiments.plan.hlo import collectives
from experiments.plan.placing import places_of
from experiments.plan.plan import held_bytes, search_needs, update_need, whole_bytes

LAYERS = 4
PROMPTS = 8
CASES = {"70b": "v5p:2x2x4", "8b": "v5e:2x4"}
PARTS = 128
# A network lies on one host; of v5p it has four chips.
MESHES = {"70b": {"model": 4, "fsdp": 4}, "8b": {"model": 8}}


def facts(variant: str, layers: int) -> dict:
    config = get_config(variant)
    config.value.fit.micro_batches = PARTS
    config.mesh.update(MESHES[variant])
    experiment = describe(config).truncated(layers)
    topology = parse_topology(CASES[variant])
    places = places_of(topology, experiment.mesh)
    mesh = places.own
    needs, programs = search_needs(experiment, mesh, PROMPTS, guided=True)
    fit_need, update = update_need(experiment, places)
    compiled = [*((program, mesh.shape) for program in programs), (update, places.mesh.shape)]
    policy, value = experiment.policy, experiment.value.network
    return {
        "mesh": dict(mesh.shape),
        "memory": topology.chip.memory,
        "held": held_bytes(experiment, mesh, PROMPTS),
        "whole": whole_bytes(experiment, mesh, PROMPTS),
        "parameters": [
            sum(x.size for x in jax.tree.leaves(network.abstract_params()))
            for network in (policy, value)
        ],
        "prompt_tokens": experiment.prompt_tokens,
        "value_slots": experiment.value_slots,
        "needs": {need.name: need.total for need in [*needs, fit_need]},
        "arguments": {program.name: program.memory["arguments"] for program in programs},
        "outputs": {program.name: program.memory["outputs"] for program in programs},
        "collectives": [
            (program.name, x.kind, x.size, x.axes(dict(shape)), len(x.loops))
            for program, shape in compiled
            for x in collectives(program.text)
        ],
    }


def main(variant: str) -> None:
    print(json.dumps(facts(variant, LAYERS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
