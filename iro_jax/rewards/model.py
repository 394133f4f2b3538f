"""Reward models: a network that reads the conversation with the answer and gives one number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from iro_jax.data import Prompt
from iro_jax.models import Network, Pretrained, TextFormat, bucket_length, render, same_tokenizer
from iro_jax.models.network import Params
from iro_jax.models.text import check_ids
from iro_jax.rewards.token_scores import ScoreFn, TokenScores, Transform
from iro_jax.rewards.types import Answer, check_pairs, check_rewards


class ModelReward:
    """The score of a network at the last token of the answer, its EOS included.

    A checkpoint with a score head, with its own tokenizer and chat template:

        ModelReward.of(from_pretrained(name))

    Any other network and head, such as a value function's, that gives a score at every token:

        def score_fn(params, tokens, mask):
            return network.forward(params, tokens, mask)[..., 0]

        ModelReward(score_fn, function.params, function.tokenizer)

    Args:
      score_fn: pure; jitted here.
      params: its first argument.
      tokenizer: that the network reads text with.
      policy_tokenizer: that the answers were sampled with. If it has the same vocabulary, the
        very tokens that were sampled are read, where an answer has some; the text tokenised
        again may be other tokens.
      text_format: limits the prompt, as everywhere.
      transform: `sigmoid` for networks that give a logit.
      batch_size: rows of a batch; incomplete ones are filled up.
      bucket: from a sequence's length to the padded one; each length is a program.
      vocab_size: of the network; None leaves token ids unchecked.
    """

    def __init__(
        self,
        score_fn: ScoreFn,
        params: object,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
        text_format: TextFormat = TextFormat(),
        transform: Transform = "identity",
        batch_size: int = 16,
        bucket: Callable[[int], int] = bucket_length,
        vocab_size: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.text_format = text_format
        self.vocab_size = vocab_size
        self.reads_sampled_tokens = policy_tokenizer is not None and (
            same_tokenizer(policy_tokenizer, tokenizer)
        )
        self._scores = TokenScores(
            score_fn, params, transform=transform, batch_size=batch_size, bucket=bucket
        )

    @classmethod
    def of(
        cls,
        model: Pretrained,
        *,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
        text_format: TextFormat = TextFormat(),
        transform: Transform = "identity",
        batch_size: int = 16,
        bucket: Callable[[int], int] = bucket_length,
    ) -> ModelReward:
        """The reward of a checkpoint with a score head; the arguments are those of the class.

        Raises:
          ValueError: it has no score head or no tokenizer.
        """
        return cls(
            score_head(model),
            model.params,
            own_tokenizer(model),
            policy_tokenizer=policy_tokenizer,
            text_format=text_format,
            transform=transform,
            batch_size=batch_size,
            bucket=bucket,
            vocab_size=model.network.config.vocab_size,
        )

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`.

        Raises:
          ValueError: a conversation cannot be rendered, or a reward is not finite; names the
            prompt's id. Nothing has been read if one cannot be rendered.
        """
        check_pairs(prompts, answers)
        sequences = [self.tokens(*pair) for pair in zip(prompts, answers, strict=True)]
        return check_rewards([float(row[-1]) for row in self._scores(sequences)], prompts)

    def tokens(self, prompt: Prompt, answer: Answer) -> Int[np.ndarray, " length"]:
        """What the network reads for an answer."""
        sampled = self.reads_sampled_tokens and len(answer.tokens) > 0
        try:
            tokens = render(
                self.tokenizer,
                prompt.conversation,
                answer=answer.tokens if sampled else answer.text,
                finished=answer.finished,
                text_format=self.text_format,
            )
            if self.vocab_size is not None:
                check_ids(tokens, self.vocab_size)
        except ValueError as error:
            raise ValueError(f"Prompt {prompt.id!r}: {error}") from error
        return tokens


def score_head(model: Pretrained) -> ScoreFn:
    """The score of a checkpoint at every token.

    Raises:
      ValueError: it has no score head.
    """
    if model.network.config.head != "score":
        raise ValueError(
            f"{model.origin}: a reward model needs a score head."
            f" Got: head={model.network.config.head!r}"
        )
    return functools.partial(_score, model.network)


def own_tokenizer(model: Pretrained) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
      ValueError: it came without one.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.origin}: there is no tokenizer to read answers with")
    return model.tokenizer


def _score(
    network: Network,
    params: Params,
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
) -> Float[jax.Array, "batch length"]:
    outputs = network.forward(params, tokens, mask, want=("score",))
    assert outputs.score is not None
    return outputs.score
