"""Guided search of a model of 8 billion parameters where an accelerator is at hand.

    python -m experiments.benchmarks.accelerator --out=accelerator.md
    python -m experiments.benchmarks.accelerator --small

A policy of Llama-3-8B's shape and one value network of Mistral-7B's (with the policy's vocabulary
and a score head), in bf16, with random weights that are made on the device. Prompts of 54 tokens,
K = B = 4, L = 16, 64 new tokens; and plain sampling. Tokens a second count those of all candidates.

The floor is the time to read weights and filled cache slots once for every step and every value
pass, at the bandwidth of the device's data sheet; the share is how much of that bandwidth a
search gets. Of many prompts a value pass is bound by arithmetic, not by reading: the share falls.

`transformers` is measured on the same device where PyTorch has it: plain sampling, and the search
of `peer.py`, one prompt at a time, with the policy's shape for its values. `--small` runs the same
code at tiny sizes anywhere.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from experiments.benchmarks.common import (
    HEAD,
    Run,
    arguments,
    guided,
    medians,
    random_prompts,
    unguided,
)
from experiments.plan.architectures import hf_config
from experiments.plan.by_hand import slot_bytes
from experiments.plan.chips import chip_of
from iro_jax.evaluation import markdown_table
from iro_jax.guidance import GuidedSearch, ValueSum, ValueSumParams
from iro_jax.models import Network, Params, TransformerConfig, translate_config
from iro_jax.values import ValueNetwork, ValueParams

_PROMPTS = flags.DEFINE_list("prompts", ["1", "8"], "Prompts searched together.")
_SAMPLES = flags.DEFINE_list("samples", ["16", "128"], "Sequences of plain sampling.")
_LENGTH = flags.DEFINE_integer("length", 54, "Tokens of a prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "New tokens of an answer.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each program.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny networks.")
_OUT = flags.DEFINE_string("out", None, "File for the table; it is printed in any case.")

TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

HEADER = ("", "together", "seconds", "tokens/s", "floor s", "share", "transformers' tokens/s")
NOT_MEASURED = "not measured"


def bandwidth(kind: str) -> float | None:
    """Of a device's memory by its data sheet, bytes a second; None if it is not known.

    >>> bandwidth("NVIDIA H100 80GB HBM3")
    3350000000000.0
    """
    chip = chip_of(kind)
    return None if chip is None else chip.bandwidth


@dataclasses.dataclass(frozen=True)
class Reader:
    """A network, and what reading it once costs.

    Attributes:
      network: the architecture.
      params: its weights.
    """

    network: Network
    params: Params

    @property
    def weight_bytes(self) -> int:
        """Of the matrices that a pass reads: an embedding that is looked up does not count."""
        looked_up = "unembedding" in self.params or self.network.config.head == "score"
        leaves = jax.tree.leaves([self.params[k] for k in self.params if k != "embedding"])
        if not looked_up:
            leaves += jax.tree.leaves(self.params["embedding"])
        return sum(x.nbytes for x in leaves)

    @property
    def slot_bytes(self) -> int:
        """Of one token's keys and values."""
        return slot_bytes(self.network.config)


def random_reader(config: TransformerConfig, seed: int) -> Reader:
    """Random weights of the configuration's own type, made parameter by parameter."""
    dtype = jnp.dtype(config.dtype)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, shape):
        flat = jax.random.normal(key, (math.prod(shape),), dtype)
        return (0.02 * flat).reshape(shape)

    network = Network(config)
    leaves, structure = jax.tree.flatten(network.abstract_params())
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [
        draw(key, leaf.shape) if leaf.ndim > 1 else jnp.ones(leaf.shape, dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return Reader(network, jax.tree.unflatten(structure, made))


def search_bytes(
    policy: Reader, values: Reader | None, search: GuidedSearch, prompts: int, length: int
) -> int:
    """What a search has to read: weights and filled slots, for every step and value pass."""
    width, candidates = search.beam_width, search.beam_width * search.num_successors

    def slots(chunk: int, inside: int) -> int:
        return prompts * (length + width * chunk * search.chunk_length + candidates * inside)

    readers = [policy] if values is None else [policy, values]
    total = sum(reader.weight_bytes for reader in readers)  # the prompts
    for chunk in range(search.max_steps):
        for inside in range(1, search.chunk_length + 1):
            total += policy.weight_bytes + policy.slot_bytes * slots(chunk, inside)
        if values is not None:
            total += values.weight_bytes + values.slot_bytes * slots(chunk, search.chunk_length)
    return total


def shape() -> dict[str, Any]:
    """Of the policy, and of the value network: Mistral-7B's layers have Llama-3-8B's sizes."""
    return hf_config("meta-llama/Meta-Llama-3-8B-Instruct") | (TINY if _SMALL.value else {})


def readers() -> tuple[Reader, Reader]:
    """The policy and the value network."""
    policy = translate_config(shape(), head="logits", dtype="bfloat16")
    values = translate_config(shape(), head="score", dtype="bfloat16")
    return random_reader(policy, 0), random_reader(values, 1)


def torch_device() -> str | None:
    """Where PyTorch can run beside us: on the accelerator, or with `--small` anywhere."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if torch.cuda.is_available() and (_SMALL.value or jax.default_backend() == "gpu"):
        return "cuda"
    return "cpu" if _SMALL.value else None


def random_peer() -> Any | None:
    """The peer with random weights of the policy's shape; None if it cannot run here."""
    device = torch_device()
    if device is None:
        return None
    import torch
    import transformers

    from experiments.benchmarks.peer import Peer

    config = transformers.AutoConfig.for_model(**shape())
    peer = Peer.__new__(Peer)
    with torch.device(device):
        peer.policy = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        peer.heads = [torch.randn(config.hidden_size, dtype=torch.bfloat16)]
    peer.policy.eval()
    return peer


def waiting(run: Run) -> Run:
    """A run of PyTorch's that ends when its device is done."""
    import torch

    def finished() -> object:
        result = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return finished


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a search of `together` prompts, and the peer's run that stands beside it.

    Attributes:
      tokens: sampled by all candidates.
      peer: of `peer_tokens`; None where there is none.
    """

    name: str
    together: int
    search: GuidedSearch
    run: Run
    values: Reader | None
    tokens: int
    peer: Run | None
    peer_tokens: int


def cases(policy: Reader, values: Reader, peer: Any | None) -> Iterator[Case]:
    head = HEAD.init(jax.random.key(0), values.network.config.embed_dim)
    scorer = ValueSum((ValueNetwork(values.network, HEAD),))
    params = ValueSumParams((ValueParams(values.params, head),), jnp.ones(1))
    searching = guided(policy.network, scorer, _TOKENS.value)
    sampling = unguided(policy.network, _TOKENS.value)
    guided_by_values = (
        ("1 value network", searching, params, values, size) for size in map(int, _PROMPTS.value)
    )
    plain = (("plain sampling", sampling, None, None, size) for size in map(int, _SAMPLES.value))
    for name, search, of_scorer, reader, size in (*guided_by_values, *plain):
        called_with = arguments(search, policy.params, of_scorer, size, _LENGTH.value)
        run = functools.partial(jax.jit(search), *called_with)
        each = search.beam_width * search.num_successors * _TOKENS.value
        beside, beside_tokens = None, 0
        if peer is not None:
            beside, beside_tokens = peer_run(peer, search, size)
        yield Case(name, size, search, run, reader, size * each, beside, beside_tokens)


def peer_run(peer: Any, search: GuidedSearch, size: int) -> tuple[Run, int]:
    """The peer's search of one prompt, or its sampling of all, and the tokens that it samples."""
    vocabulary = search.policy.config.vocab_size
    prompts = [prompt.tolist() for prompt in random_prompts(vocabulary, size, _LENGTH.value)]
    candidates = search.beam_width * search.num_successors
    if candidates == 1:
        return waiting(functools.partial(peer.generate, prompts, _TOKENS.value)), (
            size * _TOKENS.value
        )
    run = functools.partial(peer.search, prompts[0], max_new_tokens=_TOKENS.value)
    return waiting(run), candidates * _TOKENS.value


def measured(case: Case, policy: Reader, speed: float | None) -> tuple[str, ...]:
    """A row of the table."""
    runs = {"ours": case.run} | ({} if case.peer is None else {"peer": case.peer})
    found = medians(runs, _ROUNDS.value)
    floor, share = "unknown", "unknown"
    if speed is not None:
        read = search_bytes(policy, case.values, case.search, case.together, _LENGTH.value)
        floor, share = f"{read / speed:.3f}", f"{read / speed / found['ours']:.0%}"
    peers = f"{case.peer_tokens / found['peer']:,.0f}" if "peer" in found else NOT_MEASURED
    rate = f"{case.tokens / found['ours']:,.0f}"
    return (case.name, str(case.together), f"{found['ours']:.3f}", rate, floor, share, peers)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    # PyTorch needs room on the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform == "cpu" and not _SMALL.value:
        raise app.UsageError("No accelerator is at hand; --small runs the same code at tiny sizes")
    policy, values = readers()
    speed = bandwidth(device.device_kind)
    rows = []
    for case in cases(policy, values, random_peer()):
        rows.append(measured(case, policy, speed))
        print(*rows[-1], sep="  ", flush=True)
    of_device = "unknown" if speed is None else f"{speed / 1e9:,.0f} GB/s"
    shapes = "tiny networks" if _SMALL.value else "Llama-3-8B and Mistral-7B shapes"
    text = (
        f"{device.device_kind}, {datetime.date.today()}, JAX {jax.__version__}, {shapes}, bf16,"
        f" bandwidth {of_device}\n\n{markdown_table(HEADER, rows)}\n"
    )
    print(text)
    if _OUT.value is not None:
        Path(_OUT.value).write_text(text)


if __name__ == "__main__":
    app.run(main)
