"""Lexicons: rewards that add up what words are worth."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from iro_jax.data import Prompt
from iro_jax.rewards.types import Answer, check_pairs, check_rewards, read_text

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


class LexiconReward:
    """The weights of the words of a text, added up.

    Args:
      weights: of words, in any case. A word is letters and digits, with apostrophes and hyphens
        inside it; a key that is no such word would never be found.
      average: divides by the number of words, so that length does not pay.
      whole_text: reads the prompt too; see `read_text`.

    Raises:
      ValueError: a key is not one word, or two keys differ in case only.
    """

    def __init__(
        self, weights: Mapping[str, float], *, average: bool = False, whole_text: bool = False
    ):
        self.weights = {word.lower(): float(weight) for word, weight in weights.items()}
        broken = [word for word in weights if not _WORD.fullmatch(word)]
        if broken:
            raise ValueError(f"A lexicon has single words. Got: {broken[0]!r}")
        if len(self.weights) != len(weights):
            raise ValueError("Words of a lexicon must differ in more than case. Got: duplicates")
        self.average = average
        self.whole_text = whole_text

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`; 0 without words."""
        check_pairs(prompts, answers)
        pairs = zip(prompts, answers, strict=True)
        texts = [read_text(*pair, whole_text=self.whole_text) for pair in pairs]
        return check_rewards([self._score(text) for text in texts], prompts)

    def _score(self, text: str) -> float:
        words = _WORD.findall(text.lower())
        total = sum(self.weights.get(word, 0.0) for word in words)
        return total / max(len(words), 1) if self.average else total


class VaderReward:
    """VADER's compound sentiment, from -1 to 1 (Hutto and Gilbert, 2014); 0 without words.

    Args:
      whole_text: reads the prompt too; see `read_text`.

    Raises:
      ImportError: the package `vaderSentiment`, which has the lexicon inside, is not installed.
    """

    def __init__(self, *, whole_text: bool = False):
        try:
            vader = importlib.import_module("vaderSentiment.vaderSentiment")
        except ImportError as error:
            raise ImportError(
                "VaderReward needs the package `vaderSentiment`: "
                f"pip install 'iro_jax[vader]'. Got: {error}"
            ) from error
        self._analyzer = vader.SentimentIntensityAnalyzer()
        self.whole_text = whole_text

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`."""
        check_pairs(prompts, answers)
        pairs = zip(prompts, answers, strict=True)
        texts = [read_text(*pair, whole_text=self.whole_text) for pair in pairs]
        scores = [self._analyzer.polarity_scores(text)["compound"] for text in texts]
        return check_rewards(scores, prompts)
