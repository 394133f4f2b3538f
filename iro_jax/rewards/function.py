"""Any Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from iro_jax.data import Prompt
from iro_jax.models import Conversation
from iro_jax.rewards.types import Answer, check_pairs, check_rewards


class CallableReward:
    """A reward from any Python function of a conversation and an answer's text.

    Args:
      function: from one conversation and one text to a number.
      batched: the function takes all conversations and all texts, and gives as many numbers.
    """

    def __init__(
        self,
        function: Callable[[Conversation, str], float]
        | Callable[[Sequence[Conversation], Sequence[str]], Sequence[float]],
        *,
        batched: bool = False,
    ):
        self.function: Callable[..., Any] = function
        self.batched = batched

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`. What the function raises passes through, with a note."""
        check_pairs(prompts, answers)
        if self.batched:
            conversations = [prompt.conversation for prompt in prompts]
            return check_rewards(
                self.function(conversations, [answer.text for answer in answers]), prompts
            )
        pairs = zip(prompts, answers, strict=True)
        return check_rewards([self._score(*pair) for pair in pairs], prompts)

    def _score(self, prompt: Prompt, answer: Answer) -> float:
        try:
            return float(self.function(prompt.conversation, answer.text))
        except Exception as error:
            error.add_note(f"The reward was asked for an answer to prompt {prompt.id!r}")
            raise
