"""What a guided search of text returns, and what picks the answer among its finalists.

Shared by `Guide`, whose policy is a network, and `ApiGuide`, whose policy is a server.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int
from tqdm.auto import tqdm

from iro_jax.guidance.trees import TreeNode, tree_nodes
from iro_jax.models import Conversation
from iro_jax.search import Finalists, SearchOutput, majority

Reward: TypeAlias = Callable[[Sequence[Conversation], Sequence[str]], Sequence[float]]
"""From prompts and their answers, one each, to one number each."""

Vote: TypeAlias = Callable[[str], Hashable | None]
"""What an answer says, or None if it says nothing."""

Selection = Literal["reward", "value", "majority"]

AnswerSource = Literal["finalists", "beams"]


@dataclasses.dataclass(frozen=True)
class GuidedAnswer:
    """One finalist as text.

    Attributes:
      text: the answer without special tokens, cut before a stop string.
      tokens: its ids, EOS included.
      finished: whether it ended by itself.
      log_probs: of each token under the policy, in nats.
      score: what guided the search, at the last token.
      values: of every value function, at the last token.
      reward: where a reward picks the answer.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    log_probs: tuple[float, ...]
    score: float
    values: tuple[float, ...]
    reward: float | None = None

    @property
    def log_prob(self) -> float:
        """Summed over tokens."""
        return math.fsum(self.log_probs)


@dataclasses.dataclass(frozen=True)
class Guided:
    """What a search found for one prompt.

    Attributes:
      answers: the finalists, the chosen one first.
      num_tokens: tokens that were sampled.
      num_queries: value functions that were asked, a candidate and a value function at a time.
      chunk_lengths: tokens of every chunk that was sampled, `[S, K, B]`; zero where none was.
      tree: all candidates, where they were asked for.
    """

    answers: tuple[GuidedAnswer, ...]
    num_tokens: int
    num_queries: int
    chunk_lengths: Int[np.ndarray, "S K B"] = dataclasses.field(compare=False)
    tree: tuple[TreeNode, ...] = dataclasses.field(default=(), compare=False)

    @property
    def text(self) -> str:
        """The chosen answer."""
        return self.answers[0].text


@dataclasses.dataclass(frozen=True)
class FinalChoice:
    """What picks the answer; the arguments of the guides.

    Attributes:
      selection: `value` leaves the finalists as the search has ranked them.
      reward: for `selection="reward"`.
      vote: for `selection="majority"`.
      source: what is chosen from: all finalists, or only the last beams, K answers that may repeat.
    """

    selection: Selection = "value"
    reward: Reward | None = None
    vote: Vote | None = None
    source: AnswerSource = "finalists"

    def __post_init__(self):
        if self.selection not in ("reward", "value", "majority"):
            raise ValueError(
                f"final_selection must be 'reward', 'value' or 'majority'. Got: {self.selection!r}"
            )
        if self.source not in ("finalists", "beams"):
            raise ValueError(f"answers must be 'finalists' or 'beams'. Got: {self.source!r}")
        if (self.selection == "reward") != (self.reward is not None):
            raise ValueError("final_selection='reward' and a reward belong together")
        if (self.selection == "majority") != (self.vote is not None):
            raise ValueError("final_selection='majority' and a vote belong together")

    def __call__(
        self,
        prompt: Conversation,
        output: SearchOutput,
        row: int,
        read: Callable[[tuple[int, ...]], str],
        *,
        trees: bool = False,
        by_score: bool = True,
    ) -> Guided:
        """One prompt's result.

        Args:
          prompt: as the user wrote it, for the reward.
          output: of the batch, on the host, and `row`, the prompt's place in it.
          read: from an answer's tokens to its text.
          trees: whether to tell of all candidates.
          by_score: whether these were selected by their scores alone.

        Raises:
          ValueError: a reward is NaN.
        """
        found, order = output.finalists, np.asarray(output.ranking[row])
        if self.source == "beams":
            found = output.beams
            order = np.argsort(-np.asarray(found.scores.total[row]), kind="stable")
        answers = [_answer(found, row, i, read) for i in order if found.valid[row, i]]
        if self.reward is not None:
            answers = self._by_reward(self.reward, prompt, answers)
        if self.vote is not None:
            votes = [self.vote(answer.text) for answer in answers]
            answers = [answers[i] for i in majority(votes)]
        return Guided(
            tuple(answers),
            int(output.num_tokens[row]),
            int(output.num_queries[row]),
            np.asarray(output.trace.chunk_lengths[:, row]),
            tuple(tree_nodes(output, row, read, by_score=by_score)) if trees else (),
        )

    @staticmethod
    def _by_reward(
        reward: Reward, prompt: Conversation, answers: list[GuidedAnswer]
    ) -> list[GuidedAnswer]:
        texts = [answer.text for answer in answers]
        rewards = [float(number) for number in reward([prompt] * len(answers), texts)]
        if any(math.isnan(number) for number in rewards):
            raise ValueError(f"A reward must be a number. Got: NaN for an answer to {prompt!r}")
        rewarded = [
            dataclasses.replace(answer, reward=number)
            for answer, number in zip(answers, rewards, strict=True)
        ]
        order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
        return [rewarded[i] for i in order]


def in_order(
    found: Iterable[tuple[int, Guided]], num_prompts: int, *, progress: bool
) -> list[Guided]:
    """The results of all prompts in their order, from one after the other with its number."""
    results: dict[int, Guided] = {}
    with tqdm(total=num_prompts, unit="prompt", disable=not progress) as bar:
        for index, guided in found:
            results[index] = guided
            bar.update()
    return [results[index] for index in range(num_prompts)]


def _answer(
    found: Finalists, row: int, entry: int, read: Callable[[tuple[int, ...]], str]
) -> GuidedAnswer:
    length = found.lengths[row, entry]
    tokens = tuple(map(int, found.tokens[row, entry, :length]))
    return GuidedAnswer(
        text=read(tokens),
        tokens=tokens,
        finished=bool(found.ended[row, entry]),
        log_probs=tuple(map(float, found.log_probs[row, entry, :length])),
        score=float(found.scores.total[row, entry]),
        values=tuple(map(float, found.scores.parts[row, entry])),
    )
