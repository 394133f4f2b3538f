"""Which of two answers is better: judges, and what to make of them.

A judge sees every pair twice, with the answers in either order, because most prefer the first or
the second whatever they say. What it prefers is the mean of both; how much the order alone mattered
is reported beside it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from openai import OpenAI


class JudgeError(RuntimeError):
    """A judge that cannot be reached, or whose replies cannot be read."""


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What a judge said of n pairs.

    Attributes:
      preference: for the first answer of each pair, the mean of both orders: 1 if it won both, 0 if
        it lost both, `[n]`. A reply that cannot be read counts as a tie.
      shown_first: the mean preference for whatever was shown first; 0.5 if order did not matter.
      changed: the share of pairs of which the judge preferred another answer in the other order.
      unread: replies that could not be read.
    """

    preference: Float[np.ndarray, " n"]
    shown_first: float
    changed: float
    unread: int = 0

    @property
    def win_rate(self) -> float:
        """Of the first answers, from 0 to 1."""
        return float(self.preference.mean())


class PairJudge(Protocol):
    """Judges first and second answers to the same prompts."""

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts: ...


@dataclasses.dataclass(frozen=True)
class Template:
    """How a judge is asked, and how its reply is read.

    Attributes:
      text: with the fields `{prompt}`, `{a}` and `{b}`.
      verdict: what finds the letter `A` or `B` in a reply; its last match counts.
    """

    text: str
    verdict: re.Pattern[str]

    def ask(self, prompt: str, a: str, b: str) -> str:
        """The message to the judge."""
        # Not `format`: answers may have braces in them.
        fields = {"{prompt}": prompt, "{a}": a, "{b}": b}
        return re.sub(r"\{(prompt|a|b)\}", lambda match: fields[match.group()], self.text)

    def read(self, reply: str) -> str | None:
        """`A`, `B`, or None where the reply names neither."""
        found = self.verdict.findall(reply)
        return found[-1].upper() if found else None


TLDR = Template(
    text="""Here are a post from a forum and two summaries of it.

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

Which of the two tells what matters most in the post, without details that do not? Good summaries
are accurate, cover the main points, and are coherent. Write one sentence that compares the two,
beginning with "Comparison:". Then write "Preferred:" on a new line, followed by A or B and nothing
else.""",
    verdict=re.compile(r"Preferred:\W*([AB])\b", re.IGNORECASE),
)
"""Summaries of posts, as the TL;DR experiments of arXiv 2506.17828 have them judged."""

INSTRUCTION = Template(
    text="""Here are an instruction and two answers to it, from two systems.

Instruction:
{prompt}

Answer A:
{a}

Answer B:
{b}

Which answer would most people prefer? Think of whether it does what was asked, and whether it is
right, helpful and clear. Neither the order of the answers nor their length is a reason by itself.
Reply with the letter of the better answer, A or B, and nothing else.""",
    # "B", "Answer: B.", "A is better"; but not the article of "A better one would be B".
    verdict=re.compile(r"^\W*(?:Answer\W+)?([AB])(?=\W*$|[^\w\s]|\s+is\b|\s*\n)"),
)
"""Instructions and answers, in the manner of AlpacaEval."""


class ChatJudge:
    """A model behind an OpenAI-compatible chat endpoint; needs the package `openai`.

    Args:
      model: its name at the server.
      template: how it is asked.
      base_url: such as `http://localhost:8000/v1`; by default OpenAI's own.
      api_key: by default that of the environment; one's own server takes any text.
      client: an `openai.OpenAI` that is set up already, in place of the two above.
      max_tokens: of a reply.
      temperature: of the replies.
      max_connections: requests at the same time.
    """

    def __init__(
        self,
        model: str,
        template: Template,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        client: OpenAI | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        max_connections: int = 16,
    ):
        if min(max_tokens, max_connections) < 1:
            raise ValueError(
                "max_tokens and max_connections must be at least 1."
                f" Got: {max_tokens}, {max_connections}"
            )
        self.model = model
        self.template = template
        self.client = (
            _openai().OpenAI(base_url=base_url, api_key=api_key) if client is None else client
        )
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.max_connections = max_connections

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """Asks about every pair in both orders.

        Raises:
          JudgeError: the server cannot be reached or refuses, or no reply could be read.
          ValueError: there are not as many answers as prompts.
        """
        _check(prompts, first, second)
        straight = [self.template.ask(*pair) for pair in zip(prompts, first, second, strict=True)]
        swapped = [self.template.ask(*pair) for pair in zip(prompts, second, first, strict=True)]
        with ThreadPoolExecutor(self.max_connections) as pool:
            letters = list(pool.map(self._letter, [*straight, *swapped]))
        if not any(letters):
            raise JudgeError(f"{self.model}: no reply names A or B. Got: {len(letters)} replies")
        scores = np.asarray([{"A": 1.0, "B": 0.0, None: 0.5}[letter] for letter in letters])
        number = len(prompts)
        return _verdicts(scores[:number], scores[number:], unread=letters.count(None))

    def _letter(self, message: str) -> str | None:
        openai = _openai()
        try:
            response = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": message}],
                max_tokens=self.max_tokens,
                temperature=self.temperature,
            )
        except openai.OpenAIError as error:
            raise JudgeError(f"{self.client.base_url} (model {self.model!r}): {error}") from error
        content = response.choices[0].message.content if response.choices else None
        return None if content is None else self.template.read(content)


class CallableJudge:
    """A function from a prompt and two answers to the preference for the first, 0 to 1.

    It is asked in both orders, as a model would be.
    """

    def __init__(self, prefer: Callable[[str, str, str], float]):
        self.prefer = prefer

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """Raises a ValueError where a preference is not from 0 to 1."""
        _check(prompts, first, second)
        straight = self._scores(prompts, first, second)
        return _verdicts(straight, self._scores(prompts, second, first))

    def _scores(
        self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]
    ) -> Float[np.ndarray, " n"]:
        scores = np.asarray([float(self.prefer(*pair)) for pair in zip(prompts, a, b, strict=True)])
        bad = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
        if len(bad):
            raise ValueError(
                f"A preference is from 0 to 1. Got: {scores[bad[0]]} for pair {bad[0]}"
            )
        return scores


def _verdicts(
    straight: Float[np.ndarray, " n"], swapped: Float[np.ndarray, " n"], *, unread: int = 0
) -> Verdicts:
    """From preferences for what was shown first, in both orders."""
    return Verdicts(
        preference=(straight + 1 - swapped) / 2,
        shown_first=float(np.mean(np.concatenate([straight, swapped]))),
        # The same letter twice, which is another answer.
        changed=float(np.mean((straight - 0.5) * (swapped - 0.5) > 0)),
        unread=unread,
    )


def _check(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> None:
    if not len(prompts) == len(first) == len(second) or not prompts:
        raise ValueError(
            "A judge needs prompts, and a first and a second answer to each."
            f" Got: {len(prompts)}, {len(first)}, {len(second)}"
        )


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            'A judge behind an endpoint needs openai: pip install -e ".[api]", or pip install'
            f" openai. Got: {error}"
        ) from error
    return openai
