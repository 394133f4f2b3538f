"""What the parts of a run do on each device: FLOPs, bytes of memory, bytes sent.

For TPUs from compiled programs in which every loop turns once at most, at two depths, continued to
the networks' own: all layers are alike. For GPUs by hand, from shapes: nothing is compiled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.plan.estimate import SearchWork, Work
from experiments.plan.experiment import Experiment
from experiments.plan.fits import Update
from experiments.plan.hlo import collectives
from experiments.plan.placing import Places
from experiments.plan.programs import (
    Program,
    Search,
    compile_program,
    whole_caches,
)
from iro_jax.models import Network
from iro_jax.models.cache import Cache
from iro_jax.models.network import Want

DEPTHS = (1, 2)
"""Layers of the networks that are compiled to count."""


def compiled_work(experiment: Experiment, places: Places, num_prompts: int) -> SearchWork:
    """From programs that are compiled for the places of a run.

    Args:
      num_prompts: of one host.
    """
    shallow, deep = (_parts(experiment.truncated(depth), places, num_prompts) for depth in DEPTHS)
    policy, value = experiment.policy.config, experiment.value.network.config
    return SearchWork(
        **{
            name: continued(
                deep[name],
                shallow[name],
                (policy if name in _OF_POLICY else value).num_layers,
            )
            for name in deep
        }
    )


def continued(deep: Work, shallow: Work, layers: int) -> Work:
    """The work of so many layers, from that of the two `DEPTHS`."""
    low, high = (min(depth, layers) for depth in DEPTHS)
    if low == high:
        return deep
    return shallow + (layers - low) / (high - low) * (deep - shallow)


_OF_POLICY = ("prefill", "token", "commit", "sample")


def work_of(program: Program) -> Work:
    sent = sum(found.sent for found in collectives(program.text))
    return Work(program.cost["flops"], program.cost["bytes"], sent)


def _parts(experiment: Experiment, places: Places, num_prompts: int) -> dict[str, Work]:
    """Of networks that are as deep as the experiment's."""
    length = experiment.search.chunk_length
    whole = Search(experiment, places.own, num_prompts, 1)
    half = dataclasses.replace(
        whole, capacity=-(-experiment.search.max_new_tokens // 2 // length) * length
    )
    sampling = dataclasses.replace(whole, num_values=0)
    with whole_caches():
        found = {
            "prefill": _prefill(experiment.policy, whole.params.policy, whole),
            "token": half.of_one_token().expand(),
            "commit": _commit(whole.caches["policy"][0], whole),
            "sample": sampling.of_one_token().expand(),
        }
        if not experiment.on_policy:
            value = experiment.value_networks(1)[0]
            params = whole.params.scorer.networks[0]
            found |= {
                "value_prefill": _prefill(value.network, params.backbone, whole),
                "value_chunk": _extend(half),
                "value_commit": _commit(whole.caches["values"][0], whole),
            }
        parts = experiment.fitting.fit.micro_batches
        part = Update(experiment, places.mesh, experiment.fitting.fit.batch_size // parts, 1)
        gradient, update = work_of(part.gradient()), work_of(part.update())
    counted = {name: work_of(program) for name, program in found.items()}
    return counted | {"gradient": gradient, "optimizer": update - gradient}


def _prefill(network: Network, params: Any, search: Search) -> Program:
    def read(params, tokens, mask):
        prompts, slots = tokens.shape
        cache = network.empty_cache(num_prompts=prompts, prompt_slots=slots)
        want: tuple[Want, ...] = ("score",) if network.config.head == "score" else ("hidden",)
        return network.prefill(params, cache, tokens, mask, want=want)

    return compile_program("prefill", read, (params, *search.prompts[:2]), search.mesh)


def _extend(search: Search) -> Program:
    experiment, guided = search.experiment, search.guided
    value = experiment.value_networks(1)[0]
    lead = (search.num_prompts, guided.beam_width, guided.num_successors)
    slots = experiment.value_slots
    memory = search.state.score_memory
    of_network = memory[1][0] if experiment.foreign else memory[0]
    kept = search.integers(*lead) if experiment.foreign else None
    tokens = search.integers(*lead, slots)
    mask = search.booleans(*lead, slots)
    call = (search.params.scorer.networks[0], of_network, tokens, mask, kept)
    return compile_program("values of a chunk", value.extend, call, search.mesh, donated=(1,))


def _commit(cache: Cache, search: Search) -> Program:
    parents = search.integers(search.num_prompts, search.guided.beam_width)
    call = (cache, parents)
    return compile_program("commit", Cache.commit, call, search.mesh, donated=(0,))
