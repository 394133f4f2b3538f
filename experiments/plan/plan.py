"""Everything that is planned of a run: memory, batches, collectives, times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.plan.chips import Chip, Topology
from experiments.plan.estimate import Line, SearchWork, largest_batch
from experiments.plan.experiment import Experiment, weights
from experiments.plan.fits import Update
from experiments.plan.hlo import Collective, collectives
from experiments.plan.placing import Places, device_bytes, with_shardings
from experiments.plan.programs import (
    Program,
    Search,
    TooLargeError,
)

_TRIES = 4
"""Looks at smaller and smaller batches where the line through two of them has promised too much."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Memory of one program on one device, in bytes.

    Attributes:
      name: of the program.
      resident: weights and state that are there whatever runs.
      extra: what the program adds, temporaries and outputs; None where nothing was compiled.
      seconds: that compiling it took here.
    """

    name: str
    resident: int
    extra: int | None
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return self.resident + (self.extra or 0)


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch.

    Attributes:
      kind: what of.
      size: that fits, found by the line through two plans; 0 if nothing does.
      need: what the compiler plans for just this, in bytes; None if it found no room at all.
    """

    kind: str
    size: int
    need: int | None


def held_bytes(experiment: Experiment, mesh: Mesh, prompts: int) -> dict[str, int]:
    """What a guided search with all value functions keeps on a device, by shapes and shardings."""
    search = Search(experiment, mesh, prompts, experiment.num_iterations)
    found = {
        "weights of the policy": device_bytes(search.params.policy),
        "weights of the value functions": device_bytes(search.params.scorer),
        "weights of the reward model": reward_bytes(experiment, mesh),
    }
    for owner, caches in search.caches.items():
        for part in ("prompt", "beams", "chunk"):
            size = device_bytes([getattr(cache, part) for cache in caches])
            found[f"{owner}: {part} cache"] = size
    caches = [cache for of_owner in search.caches.values() for cache in of_owner]
    return found | {"the rest of the state": device_bytes(search.state) - device_bytes(caches)}


def reward_bytes(experiment: Experiment, mesh: Mesh) -> int:
    """Of the reward model's weights on a device."""
    reward = experiment.reward
    if reward is None:
        return 0
    return device_bytes(with_shardings(weights(reward), reward.param_shardings(mesh)))


def search_needs(
    experiment: Experiment, mesh: Mesh, prompts: int, *, guided: bool
) -> tuple[list[Need], list[Program]]:
    """Of a search with all value functions, or of plain sampling, which needs none of them."""
    search = Search(experiment, mesh, prompts, experiment.num_iterations if guided else 0)
    held = device_bytes(search.params) + reward_bytes(experiment, mesh)
    resident = held + device_bytes(search.state)
    # Without value functions prompts are read as with them, by fewer networks.
    reading = [search.prefill()] if guided else []
    programs = [*reading, *search.step()]
    needs = [
        Need(x.name, held if x in reading else resident, extra_bytes(x), x.seconds)
        for x in programs
    ]
    return needs, programs


def update_need(
    experiment: Experiment, places: Places, rollouts: int | None = None
) -> tuple[Need, Program]:
    """Of a fit, beside which policy, reward and earlier value functions stay where they are.

    Args:
      rollouts: of one part that is a whole update; the configured batch if None.
    """
    update = Update(experiment, places.mesh, rollouts, None if rollouts is None else 1)
    program, state = update.update(), update.state
    search = Search(experiment, places.own, places.shares, experiment.num_iterations - 1)
    kept = device_bytes(search.params) + reward_bytes(experiment, places.own)
    # The best parameters so far are kept beside the current ones.
    resident = kept + device_bytes(state) + device_bytes(state["params"])
    batch = device_bytes(update.batch())
    need = Need(program.name, resident + batch, extra_bytes(program), program.seconds)
    return need, program


def extra_bytes(program: Program) -> int:
    found = program.memory
    return found["outputs"] + found["temporaries"] + found["code"]


def whole_bytes(experiment: Experiment, mesh: Mesh, prompts: int) -> dict[str, int]:
    """What no device should ever gather while it searches, in bytes: the smallest of each kind.

    Whole over `model`, that is; the prompts are those of one device.
    """
    own = prompts // (mesh.shape["data"] * mesh.shape["fsdp"])
    chosen = experiment.search
    networks = [experiment.policy]
    if not experiment.on_policy:
        networks.append(experiment.value.network)
    matrices = [
        x.size * jnp.dtype(network.config.dtype).itemsize
        for network in networks
        for x in jax.tree.leaves(network.abstract_params())
        if x.ndim > 1 and 1 not in x.shape
    ]
    caches = [
        own * slots * network.config.num_kv_heads * network.config.head_dim * 2
        for network in networks
        for slots in (experiment.prompt_tokens, chosen.beam_width * chosen.max_new_tokens)
    ]
    return {
        "a matrix of weights": min(matrices),
        "keys of a layer's cache": min(caches),
        "logits of all candidates": 4
        * own
        * chosen.num_candidates
        * experiment.policy.config.vocab_size,
    }


def largest_gather(program: Program) -> Collective | None:
    """The all-gather with the largest result."""
    gathers = [found for found in collectives(program.text) if found.kind == "all-gather"]
    return max(gathers, key=lambda found: found.size, default=None)


def find_largest(
    kind: str,
    total: Callable[[int], int | None],
    multiple: int,
    memory: float,
    known: tuple[int, int] | None = None,
) -> Largest:
    """The largest batch, by the line through what two of them need, and a look at the answer.

    Args:
      total: bytes that so many need; None where the compiler finds no room.
      multiple: in which prompts, or rollouts, are shared evenly.
      memory: bytes of a device.
      known: a batch, and bytes that it needs, if that was looked at.
    """
    needs: dict[int, int | None] = {} if known is None else {known[0]: known[1]}

    def need(size: int) -> int | None:
        if size not in needs:
            needs[size] = total(size)
        return needs[size]

    smallest = need(multiple)
    if smallest is None or smallest > memory:
        return Largest(kind, 0, smallest)
    other = 2 * multiple if known is None or known[0] == multiple else known[0]
    second = need(other)
    if second is None:
        return Largest(kind, multiple, smallest)
    answer = largest_batch((multiple, other), (smallest, second), memory, multiple)
    for _ in range(_TRIES):
        used = need(answer)
        if used is not None and used <= memory:
            return Largest(kind, answer, used)
        # The line was too steep somewhere; the compiler does not always say by how much.
        share = 0.9 if used is None else min(memory / used, 0.98)
        answer = max(int(share * answer) // multiple * multiple, multiple)
    return Largest(kind, multiple, smallest)


def largest_batches(
    experiment: Experiment,
    places: Places,
    memory: float,
    known: Mapping[bool, tuple[int, int]],
) -> list[Largest]:
    """Of a host's guided searches and plain sampling, and of what a fit computes at once."""
    shares = places.shares
    of_fits = places.mesh.shape["data"] * places.mesh.shape["fsdp"]

    def of_search(guided: bool, prompts: int) -> int | None:
        try:
            needs, _ = search_needs(experiment, places.own, prompts, guided=guided)
        except TooLargeError:
            return None
        return max(need.total for need in needs)

    def of_fit(rollouts: int) -> int | None:
        try:
            return update_need(experiment, places, rollouts)[0].total
        except TooLargeError:
            return None

    return [
        find_largest(
            "guided search, prompts", partial(of_search, True), shares, memory, known.get(True)
        ),
        find_largest(
            "plain sampling, prompts", partial(of_search, False), shares, memory, known.get(False)
        ),
        find_largest("a part of a fit's batch, rollouts", of_fit, of_fits, memory),
    ]


def stages(
    experiment: Experiment, work: SearchWork, topology: Topology, prompts: int
) -> list[Line]:
    """What the experiment's iterations take: searches for rollouts, and fits.

    The first rollouts are sampled without guidance. Rollouts are all finalists, at most K * B for
    each prompt; a fit that stops early takes less than here.
    """
    chip, chosen = topology.chip, experiment.search
    calls = math.ceil(experiment.prompts / prompts)
    found = []
    for iteration in range(experiment.num_iterations):
        if iteration:
            networks = passes(experiment, iteration)
            each = work.search_seconds(
                experiment.answer_tokens, chosen.chunk_length, networks, chip
            )
            name = f"rollouts {iteration + 1}, guided by {iteration}"
        else:
            each, name = (
                work.sampling_seconds(experiment.answer_tokens, chip),
                "rollouts 1, sampled",
            )
        found.append(Line(name, calls, each))
        found.append(_fit(experiment, work, f"value function {iteration + 1}", chip))
    if experiment.compress:
        sets = experiment.num_iterations
        found.append(_fit(experiment, work, "compression", chip, sets))
    return found


def passes(experiment: Experiment, num_values: int) -> int:
    """Value networks that are read for so many value functions."""
    if experiment.on_policy:
        return 0
    return len(experiment.value_networks(num_values))


def _fit(experiment: Experiment, work: SearchWork, name: str, chip: Chip, sets: int = 1) -> Line:
    """A fit to the rollouts of so many iterations."""
    compressing = sets > 1 and experiment.fitting.compression
    settings = compressing or experiment.fitting.fit
    rollouts = sets * experiment.prompts * experiment.search.num_candidates
    updates = settings.num_epochs * max(
        round(rollouts * experiment.trained) // settings.batch_size, 1
    )
    # What an update of another size takes goes by its rollouts.
    share = settings.batch_size / experiment.fitting.fit.batch_size
    each = share * work.update_seconds(experiment.fitting.fit.micro_batches, chip)
    return Line(name, updates, each)
