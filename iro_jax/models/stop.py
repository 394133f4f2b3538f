"""Stop strings as an automaton over tokens, so that a compiled program can match them.

The automaton of Aho and Corasick reads bytes; its states are the prefixes of the stop
strings. A table tells, for each state and token, where the token's bytes lead. A token may
hold the end of a stop string anywhere, so the answer ends with the first token that
completes one, and its text is cut before it (`cut`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

START = 0
"""The state of a text that has nothing in common with a stop string."""

STOPPED = -1
"""The state after a stop string; it is never left."""


def stop_table(stop_strings: Sequence[str], table: Sequence[bytes]) -> Int[np.ndarray, "states V"]:
    """The transitions of all tokens.

    Args:
      stop_strings: any of them ends an answer.
      table: bytes of every token; see `iro_jax.models.token_bytes`.

    Returns:
      The next state by state and token: `START`, a longer prefix, or `STOPPED`. The row of
      `STOPPED` is the last, so that it can be looked up like any other.

    Raises:
      ValueError: there is no stop string, or one is empty.
    """
    if isinstance(stop_strings, str) or not stop_strings or not all(stop_strings):
        raise ValueError(f"Stop strings must be a list of non-empty texts. Got: {stop_strings!r}")
    of_bytes = _byte_transitions([text.encode() for text in stop_strings])
    lengths = np.array([len(token) for token in table], int)
    first = np.cumsum(lengths) - lengths
    all_bytes = np.frombuffer(b"".join(table), np.uint8)
    of_tokens = np.empty((len(of_bytes), len(table)), np.int32)
    of_tokens[:] = np.arange(len(of_bytes))[:, None]
    of_tokens[STOPPED] = STOPPED
    for place in range(lengths.max(initial=0)):
        tokens = np.flatnonzero(lengths > place)
        bytes_here = all_bytes[first[tokens] + place]
        for states in of_tokens:
            states[tokens] = of_bytes[states[tokens], bytes_here]
    return of_tokens


def cut(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    places = [text.find(stop) for stop in stop_strings]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _byte_transitions(patterns: Sequence[bytes]) -> Int[np.ndarray, "states 256"]:
    """The next state by state and byte; shorter prefixes first, `STOPPED` last."""
    # Whoever holds another pattern never gets to its own end, nor to a prefix with the other.
    patterns = [p for p in patterns if not any(q in p for q in patterns if q != p)]
    prefixes = sorted({p[:n] for p in patterns for n in range(len(p))}, key=len)
    number = {prefix: state for state, prefix in enumerate(prefixes)}
    number |= dict.fromkeys(patterns, STOPPED)
    following = np.full((len(prefixes) + 1, 256), START, np.int32)
    following[STOPPED] = STOPPED
    longest_suffix = {START: START}
    for state, prefix in enumerate(prefixes):
        # What does not lengthen the prefix goes where its longest suffix would.
        following[state] = following[longest_suffix[state]]
        for byte in range(256):
            longer = number.get(prefix + bytes([byte]))
            if longer is not None:
                longest_suffix[longer] = following[state, byte]
                following[state, byte] = longer
    return following
