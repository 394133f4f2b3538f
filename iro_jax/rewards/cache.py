"""Rewards that are asked for once: a cache in memory, and in a file that survives the process.

The file has a JSON object a line, `{"key": ..., "reward": ...}`. Lines are only ever appended,
whole, so a killed process loses at most the line that it was writing. One process writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from iro_jax.data import Prompt
from iro_jax.rewards.types import Answer, Reward, check_pairs, check_rewards


class CachedReward:
    """A reward that scores every answer once.

    Two answers are the same if their prompt (id, conversation and reference), text, sampled
    tokens and `finished` are. What a reward says of one answer may differ in its last bits with
    what else is scored in the same call; from the cache it is always what was said first.

    Args:
      reward: what is asked.
      path: of the file; None for memory alone. A line that a killed process has left unfinished
        is cut off.
      name: what is asked, with its version. Entries of the file under another name are not
        used, so one file may serve several rewards in turn.
      batch_size: most answers to ask for at a time; they are stored before the next are asked
        for.

    Attributes:
      num_queries: answers that the reward was asked for.

    Raises:
      ValueError: the file is not such a cache; names the line.
    """

    def __init__(
        self,
        reward: Reward,
        path: str | os.PathLike[str] | None = None,
        *,
        name: str = "",
        batch_size: int = 256,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1. Got: {batch_size}")
        self.reward = reward
        self.path = None if path is None else Path(path)
        self.name = name
        self.batch_size = batch_size
        self.num_queries = 0
        self._known = {} if self.path is None else _read(self.path)

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`.

        Raises:
          OSError: the file cannot be written; what it held before is untouched.
        """
        check_pairs(prompts, answers)
        pairs = zip(prompts, answers, strict=True)
        keys = [answer_key(prompt, answer, self.name) for prompt, answer in pairs]
        # Of the same answers the first is asked for, in the order of the call.
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        new = sorted(index for key, index in first.items() if key not in self._known)
        for start in range(0, len(new), self.batch_size):
            self._ask(prompts, answers, keys, new[start : start + self.batch_size])
        return np.asarray([self._known[key] for key in keys], np.float32)

    def _ask(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Answer],
        keys: Sequence[str],
        indices: Sequence[int],
    ) -> None:
        asked = [prompts[i] for i in indices]
        rewards = check_rewards(self.reward(asked, [answers[i] for i in indices]), asked)
        self.num_queries += len(indices)
        entries = {keys[i]: float(reward) for i, reward in zip(indices, rewards, strict=True)}
        if self.path is not None:
            _append(self.path, entries)
        self._known.update(entries)


def answer_key(prompt: Prompt, answer: Answer, name: str = "") -> str:
    """A digest of an answer, its prompt and the name of what scores it."""
    value = prompt.to_json()
    parts = [name, value["id"], value["prompt"], value["reference"]]
    tokens = [int(token) for token in answer.tokens]
    described = json.dumps([*parts, answer.text, tokens, bool(answer.finished)], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _read(path: Path) -> dict[str, float]:
    """The entries of a file, which is made if there is none; cuts off an unfinished line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, float] = {}
    with path.open("a+b") as file:
        file.seek(0)
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(whole)
                break
            whole += len(line)
            try:
                entry = json.loads(line)
                known[str(entry["key"])] = float(entry["reward"])
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}, line {number}: expected a key and its reward. Got: {line[:80]!r}"
                ) from None
    return known


def _append(path: Path, entries: dict[str, float]) -> None:
    """Appends entries; a part of them that cannot be written is taken back."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            for key, reward in entries.items():
                line = (json.dumps({"key": key, "reward": reward}) + "\n").encode()
                if file.write(line) != len(line):
                    raise OSError(f"{path}: the disk is full")
        except OSError:
            file.truncate(before)
            raise
