"""Scores of token sequences by a network: batches, buckets and compilation.

What the numbers mean is the business of `model.py` and `process.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from iro_jax.models import PromptBatch, bucket_length, pad_prompts
from iro_jax.models.sharding import where

ScoreFn: TypeAlias = Callable[
    [object, Int[Array, "batch length"], Bool[Array, "batch length"]],
    Float[Array, "batch length"],
]
"""From parameters, tokens and which of them are real to a score at every token."""

Transform = Literal["identity", "sigmoid"]


class TokenScores:
    """Reads sequences of tokens and gives the score at each of them.

    Every sequence is read in the bucket of its own length, in a batch that is filled up to
    `batch_size` rows: one program a bucket, whatever is read together.

    Args:
      score_fn: pure; jitted here.
      params: its first argument.
      transform: `sigmoid` for networks that give a logit.
      batch_size: rows of a batch.
      bucket: from a sequence's length to the padded one.
    """

    def __init__(
        self,
        score_fn: ScoreFn,
        params: object,
        *,
        transform: Transform = "identity",
        batch_size: int = 16,
        bucket: Callable[[int], int] = bucket_length,
    ):
        if transform not in ("identity", "sigmoid"):
            raise ValueError(f"transform must be 'identity' or 'sigmoid'. Got: {transform!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1. Got: {batch_size}")
        self.params = params
        self.batch_size = batch_size
        self.bucket = bucket

        def scores(params, tokens, mask):
            read = score_fn(params, tokens, mask)
            if read.shape != tokens.shape:
                raise ValueError(
                    f"score_fn must give a score at every token, {tokens.shape}. Got: {read.shape}"
                )
            return jax.nn.sigmoid(read) if transform == "sigmoid" else read

        self._scores = jax.jit(scores)

    def __call__(self, sequences: Sequence[Int[np.ndarray, " length"]]) -> list[np.ndarray]:
        """The scores at the tokens of each sequence, float32 `[length]` each."""
        buckets: dict[int, list[int]] = defaultdict(list)
        for index, tokens in enumerate(sequences):
            buckets[self.bucket(len(tokens))].append(index)
        found: dict[int, np.ndarray] = {}
        for length, members in sorted(buckets.items()):
            for start in range(0, len(members), self.batch_size):
                indices = members[start : start + self.batch_size]
                batch = pad_prompts(
                    [sequences[i] for i in indices], length=length, rows=self.batch_size
                )
                for index, row in zip(indices, self._read(batch), strict=False):
                    found[index] = row[: len(sequences[index])]
        return [found[index] for index in range(len(sequences))]

    def _read(self, batch: PromptBatch) -> np.ndarray:
        with where(self.params):
            scores = self._scores(self.params, batch.tokens, batch.mask)
        return np.asarray(jax.device_get(scores), np.float32)
