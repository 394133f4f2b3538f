"""Process reward models: a score for every step of an answer, and one number from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from iro_jax.data import Prompt
from iro_jax.models import Pretrained, TextFormat, bucket_length, render
from iro_jax.rewards.model import own_tokenizer, score_head
from iro_jax.rewards.token_scores import ScoreFn, TokenScores, Transform
from iro_jax.rewards.types import Answer, check_pairs, check_rewards

Reduction = Literal["min", "last", "mean", "product"]


class ProcessReward:
    """The scores of a network at the ends of an answer's steps, reduced to one.

    A step is what stands between two `step_separator`s of the text, without white space around
    it. The network reads each followed by `step_token`, as process reward models are trained to,
    and its score is read there. An answer without any step is read as one empty step.

    Args:
      score_fn, params, tokenizer, text_format, transform, batch_size, bucket: as in
        `ModelReward`.
      step_token: the token after a step, such as `<extra_0>`; one of the vocabulary.
      step_separator: between the steps of an answer.
      reduction: `min` is the weakest step, `product` the probability that all are right.

    Raises:
      ValueError: the tokenizer does not know `step_token`, or an argument is unknown.
    """

    def __init__(
        self,
        score_fn: ScoreFn,
        params: object,
        tokenizer: PreTrainedTokenizerBase,
        *,
        step_token: str,
        step_separator: str = "\n\n",
        reduction: Reduction = "min",
        text_format: TextFormat = TextFormat(),
        transform: Transform = "sigmoid",
        batch_size: int = 16,
        bucket: Callable[[int], int] = bucket_length,
    ):
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {get_args(Reduction)}. Got: {reduction!r}")
        if not step_separator:
            raise ValueError("step_separator must not be empty. Got: ''")
        if step_token not in tokenizer.get_vocab():
            raise ValueError(f"step_token must be in the vocabulary. Got: {step_token!r}")
        self.tokenizer = tokenizer
        self.step_id = tokenizer.get_vocab()[step_token]
        self.step_separator = step_separator
        self.reduction = reduction
        self.text_format = text_format
        self._scores = TokenScores(
            score_fn, params, transform=transform, batch_size=batch_size, bucket=bucket
        )

    @classmethod
    def of(cls, model: Pretrained, *, step_token: str, **options) -> ProcessReward:
        """The reward of a checkpoint with a score head; `options` are those of the class."""
        return cls(
            score_head(model), model.params, own_tokenizer(model), step_token=step_token, **options
        )

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`."""
        rewards = [self._reduce(steps) for steps in self.steps(prompts, answers)]
        return check_rewards(rewards, prompts)

    def steps(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> list[Float[np.ndarray, " steps"]]:
        """The scores of every answer's steps."""
        check_pairs(prompts, answers)
        read = [self._tokens(*pair) for pair in zip(prompts, answers, strict=True)]
        scores = self._scores([tokens for tokens, _ in read])
        return [row[ends] for row, (_, ends) in zip(scores, read, strict=True)]

    def _tokens(
        self, prompt: Prompt, answer: Answer
    ) -> tuple[Int[np.ndarray, " length"], list[int]]:
        """What the network reads, and where the steps end."""
        parts = [part.strip() for part in answer.text.split(self.step_separator)]
        try:
            tokens = render(self.tokenizer, prompt.conversation, text_format=self.text_format)
        except ValueError as error:
            raise ValueError(f"Prompt {prompt.id!r}: {error}") from error
        ids, ends = list(tokens), []
        for step in [part for part in parts if part] or [""]:
            ids += self.tokenizer(step, add_special_tokens=False)["input_ids"]
            ends.append(len(ids))
            ids.append(self.step_id)
        return np.asarray(ids, np.int32), ends

    def _reduce(self, steps: Float[np.ndarray, " steps"]) -> float:
        numbers = [float(score) for score in steps]
        if self.reduction == "mean":
            return math.fsum(numbers) / len(numbers)
        if self.reduction == "product":
            return math.prod(numbers)
        return min(numbers) if self.reduction == "min" else numbers[-1]
