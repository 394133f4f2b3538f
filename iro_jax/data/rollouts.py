"""What a rollout is, and how it becomes a record. Where records are kept is in `store.py`."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
from flax import serialization
from jaxtyping import Float, Int

from iro_jax.data.prompts import Prompt

SCHEMA = 1
"""Version of the records and of the store's manifest; raised when one changes its meaning."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled answer with its reward.

    Attributes:
      prompt: what was asked.
      prompt_tokens: int32 [S], the prompt as the policy saw it.
      tokens: int32 [H], the answer as sampled, EOS included if it has one.
      text: the answer.
      finished: EOS or a stop string ended it, rather than the length limit.
      reward: of the whole answer; finite.
      log_probs: float32 [H], of the answer's tokens under the policy, in nats.
      iteration: of the run, from 0, that sampled it.
      candidate: which of its prompt's answers in that iteration, from 0.
      selected: whether it has the highest reward among these.
      score: what guided the search, at the last token: the sum of V_t / beta_t; zero if nothing
        did.

    Raises:
      ValueError: the reward is not finite, or the arrays have other shapes.
    """

    prompt: Prompt
    prompt_tokens: Int[np.ndarray, " prompt_length"]
    tokens: Int[np.ndarray, " length"]
    text: str
    finished: bool
    reward: float
    log_probs: Float[np.ndarray, " length"]
    iteration: int
    candidate: int
    selected: bool
    score: float = 0.0

    def __post_init__(self):
        for name, dtype in (
            ("prompt_tokens", np.int32),
            ("tokens", np.int32),
            ("log_probs", np.float32),
        ):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        for name, kind in (
            ("finished", bool),
            ("reward", float),
            ("iteration", int),
            ("candidate", int),
            ("selected", bool),
            ("score", float),
        ):
            object.__setattr__(self, name, kind(getattr(self, name)))
        if not math.isfinite(self.reward):
            raise ValueError(
                f"The reward of an answer to prompt {self.prompt.id!r} must be finite. "
                f"Got: {self.reward}"
            )
        if self.prompt_tokens.ndim != 1 or self.tokens.ndim != 1:
            raise ValueError(
                "The tokens of a rollout must be vectors. "
                f"Got: shapes {self.prompt_tokens.shape} and {self.tokens.shape}"
            )
        if self.log_probs.shape != self.tokens.shape:
            raise ValueError(
                f"log_probs must have the shape of tokens, {self.tokens.shape}. "
                f"Got: {self.log_probs.shape}"
            )

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens)

    def to_bytes(self) -> bytes:
        """The rollout as a record: equal rollouts give equal bytes."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("prompt", "prompt_tokens", "tokens", "log_probs")
        }
        return serialization.msgpack_serialize(
            {
                "schema": SCHEMA,
                # JSON, because MessagePack has neither all integers nor all strings of JSON.
                "plain": json.dumps({**plain, "prompt": self.prompt.to_json()}),
                "prompt_tokens": self.prompt_tokens,
                "tokens": self.tokens,
                "log_probs": self.log_probs,
            }
        )

    @classmethod
    def from_bytes(cls, record: bytes) -> Rollout:
        """The rollout that `to_bytes` gave `record` for.

        Raises:
          ValueError: the record has another schema.
        """
        stored = serialization.msgpack_restore(record)
        if (schema := stored.pop("schema")) != SCHEMA:
            raise ValueError(f"Expected a record of schema {SCHEMA}. Got: {schema!r}")
        fields = json.loads(stored.pop("plain"))
        fields["prompt"] = Prompt.from_json(fields["prompt"])
        # What was read is a view of the record, and not writable.
        fields.update({name: np.array(array) for name, array in stored.items()})
        return cls(**fields)
