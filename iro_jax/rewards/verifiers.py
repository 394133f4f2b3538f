r"""Exact match: the final answer is found in the text and compared with the reference.

An `Extract` finds it: `boxed_answer` for `\boxed{}`, `gsm8k_answer` for `#### 72`,
`last_number` for models that use neither. `ExactMatch` compares up to notation (see
`iro_jax.rewards.notation`), and its `vote` is what a majority is taken over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from iro_jax.data import Prompt
from iro_jax.rewards.notation import normalise_answer
from iro_jax.rewards.types import Answer, check_pairs, check_rewards

Extract: TypeAlias = Callable[[str], str | None]
"""From a text to the final answer in it as written, or None."""

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_NUMBER = re.compile(
    r"(?<![\w.])[-\u2212+]?(?:\\?\$)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?%?"
)
_HASHES = re.compile(r"####[^\S\n]*([^\n]*)")


def boxed_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` or `\fbox{...}` that is closed holds; braces may nest."""
    found = None
    for box in _BOX.finditer(text):
        content = _until_closed(text, box.end())
        found = found if content is None else content
    return found


def gsm8k_answer(text: str, *, or_last_number: bool = False) -> str | None:
    """What follows the last `####`, up to the end of its line.

    Args:
      or_last_number: what to give where there is no `####`: `last_number`, or None.
    """
    found = [answer.strip() for answer in _HASHES.findall(text)]
    found = [answer for answer in found if answer]
    if found:
        return found[-1]
    return last_number(text) if or_last_number else None


def worked_answer(text: str) -> str | None:
    r"""What a worked solution ends in: its last `\boxed{}`, or what follows its last `####`."""
    boxed = boxed_answer(text)
    return gsm8k_answer(text) if boxed is None else boxed


def last_number(text: str) -> str | None:
    """The last number of the text, such as `-1,234.5`, `$20`, `50%` or `1/2`."""
    numbers = [match.group() for match in _NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """1 if the answer found in the text is the prompt's reference, else 0.

    The reference is the answer itself, text or a number, or a worked solution that `extract`
    finds the answer in.

    Attributes:
      extract: finds the answer in the text.
      normalise: what is compared; equal for equal answers in different notations.
      extract_reference: finds the answer in a reference that is a worked solution, where
        solutions are written in another form than answers; None for `extract`.
    """

    extract: Extract = boxed_answer
    normalise: Callable[[str], str] = normalise_answer
    extract_reference: Extract | None = None

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`.

        Raises:
          ValueError: a prompt has no reference that could be compared with; names its id.
        """
        check_pairs(prompts, answers)
        pairs = zip(prompts, answers, strict=True)
        matches = [self.vote(answer.text) == self._wanted(prompt) for prompt, answer in pairs]
        return check_rewards(matches, prompts)

    def vote(self, text: str) -> str | None:
        """What an answer says, for majorities; None if it says nothing."""
        found = self.extract(text)
        return None if found is None else self.normalise(found) or None

    def _wanted(self, prompt: Prompt) -> str:
        reference = prompt.reference
        if isinstance(reference, bool) or not isinstance(reference, str | int | float):
            raise ValueError(
                f"Prompt {prompt.id!r}: the reference must be the right answer, text or a number."
                f" Got: {reference!r}"
            )
        written = str(reference)
        extract = self.extract_reference or self.extract
        found = extract(written) if isinstance(reference, str) else None
        wanted = self.normalise(written if found is None else found)
        if not wanted:
            raise ValueError(f"Prompt {prompt.id!r}: the reference says nothing. Got: {written!r}")
        return wanted


def _until_closed(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes it; None if there is none."""
    depth, index = 1, start
    while index < len(text):
        if text[index] == "\\":
            index += 1  # an escaped brace groups nothing
        elif text[index] in "{}":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return text[start:index]
        index += 1
    return None
