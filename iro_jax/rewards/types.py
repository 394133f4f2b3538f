"""What a reward is: prompts and answers in, one finite number each out.

The protocols that the other rooms program against, and the checks that every reward shares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from iro_jax.data import Prompt


@runtime_checkable
class Answer(Protocol):
    """A whole answer; completions and guided answers are such.

    Attributes:
      text: without special tokens.
      tokens: as the policy sampled them, EOS included; empty where nobody sampled any.
      finished: whether it ended by itself rather than at the length limit.
    """

    @property
    def text(self) -> str: ...

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def finished(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class TextAnswer:
    """An `Answer` made from text."""

    text: str
    tokens: tuple[int, ...] = ()
    finished: bool = True


class Reward(Protocol):
    """Scores whole answers, higher is better.

    An answer's reward depends on the answer and its prompt, and on what else is scored in the
    same call by floating-point rounding at most.
    """

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards of `answers[i]` to `prompts[i]`, float32 and finite."""
        ...


def check_rewards(rewards: ArrayLike, prompts: Sequence[Prompt]) -> Float[np.ndarray, " n"]:
    """What a reward has returned, as float32.

    Args:
      rewards: one number for each of `prompts`.

    Raises:
      ValueError: there are more or fewer, or one is NaN or infinite (in float32); names the
        prompt's id.
    """
    try:
        with np.errstate(over="ignore"):
            checked = np.asarray(rewards, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Rewards must be numbers ({error}). Got: {rewards!r}") from error
    if checked.shape != (len(prompts),):
        raise ValueError(
            f"There must be one reward for each of {len(prompts)} answers."
            f" Got: an array of shape {checked.shape}"
        )
    for prompt, reward, given in zip(prompts, checked, np.asarray(rewards), strict=True):
        if not np.isfinite(reward):
            raise ValueError(
                f"The reward of an answer to prompt {prompt.id!r} must be a finite number."
                f" Got: {given}"
            )
    return checked


def check_pairs(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
    """Raises a ValueError unless there is one prompt for every answer."""
    if len(prompts) != len(answers):
        raise ValueError(
            "Every answer needs a prompt, given as often as it has answers."
            f" Got: {len(prompts)} prompts and {len(answers)} answers"
        )


def read_text(prompt: Prompt, answer: Answer, *, whole_text: bool) -> str:
    """What a reward that reads plain text reads.

    Args:
      whole_text: with the prompt before the answer. A raw prompt is what the answer continues,
        so nothing comes between them; of a conversation it is the last message of the user,
        on lines of its own.
    """
    if not whole_text:
        return answer.text
    conversation = prompt.conversation
    if isinstance(conversation, str):
        return conversation + answer.text
    asked = [message["content"] for message in conversation if message["role"] == "user"]
    return "\n".join([*asked[-1:], answer.text])
