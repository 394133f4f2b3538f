"""A value function as a reward: its value of the complete answer.

A reward model that is a head on the policy's own frozen backbone reads the hidden states that
the value functions are fitted to afterwards; with a shared `StateCache` they are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from iro_jax.data import Prompt
from iro_jax.rewards import Answer
from iro_jax.values.function import AnswerTokens, ValueFunction
from iro_jax.values.prefixes import StateCache, group_by_prompt, head_values


class FunctionReward:
    """The `Reward` of a head on a frozen backbone.

    Args:
      function: the head.
      tokens: answers as it reads them.
      states: of its backbone.
      keep: whether the hidden states will be needed again.
    """

    def __init__(
        self,
        function: ValueFunction,
        tokens: AnswerTokens,
        states: StateCache,
        *,
        keep: bool = True,
    ):
        if not states.serves(function):
            raise ValueError(
                "The reward must be a head on the backbone and the layer of the hidden states."
                f" Got: layer {function.network.layer}, states of {states.reader.depth}"
            )
        self.function = function
        self.tokens = tokens
        self.states = states
        self.keep = keep

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """Rewards of answers; neighbours that share a prompt are read together."""
        readings = [
            self.tokens(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        groups = self.states(group_by_prompt(readings), keep=self.keep)
        last = [states[-1:] for group in groups for states in group]
        values = head_values(self.function, last)
        return np.asarray([of_answer[0] for of_answer in values], np.float32)
