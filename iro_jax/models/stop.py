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


def stop_table(
    stop_strings: Sequence[str], table: Sequence[bytes]
) -> Int[np.ndarray, "states V"]:
    """The transitions of all tokens.

    Args:
      stop_strings: any of them ends an answer.
      table: bytes of every token; see `iro_jax.models.token_bytes`.

    Returns:
      The next state by state and token: `START`, a prefix, or `STOPPED`.

    Raises:
      ValueError: there is no stop string, or one is empty.
    """
    if isinstance(stop_strings, str) or not stop_strings or not all(stop_strings):
        raise ValueError(f"Stop strings must be a list of non-empty texts. Got: {stop_strings!r}")
    of_bytes = _byte_transitions([text.encode() for text in stop_strings])
    num_states = of_bytes.shape[0]
    lengths = np.array([len(token) for token in table])
    states = np.repeat(np.arange(num_states, dtype=np.int32)[:, None], len(table), axis=1)
    for place in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > place)
        bytes_here = np.array([table[token][place] for token in longer])
        current = states[:, longer]
        following = of_bytes[np.maximum(current, 0), bytes_here]
        states[:, longer] = np.where(current == STOPPED, STOPPED, following)
    return states


def cut(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    places = [text.find(stop) for stop in stop_strings]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _byte_transitions(patterns: Sequence[bytes]) -> Int[np.ndarray, "states 256"]:
    """The next state by state and byte. A state is a prefix of a pattern, the empty one first."""
    prefixes = sorted({p[:n] for p in patterns for n in range(len(p))}, key=lambda p: (len(p), p))
    number = {prefix: index for index, prefix in enumerate(prefixes)}

    def following(prefix: bytes, byte: int) -> int:
        text = prefix + bytes([byte])
        if any(text.endswith(pattern) for pattern in patterns):
            return STOPPED
        suffixes = (text[start:] for start in range(len(text) + 1))
        return next(number[suffix] for suffix in suffixes if suffix in number)

    return np.array(
        [[following(prefix, byte) for byte in range(256)] for prefix in prefixes], np.int32
    )
