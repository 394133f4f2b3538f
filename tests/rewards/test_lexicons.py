"""Words and what they are worth."""

import importlib

import numpy as np
import pytest

from iro_jax.data import Prompt
from iro_jax.rewards import LexiconReward, TextAnswer, VaderReward

PROMPT = Prompt("p", "A good start,")


def score(reward, *texts):
    return reward([PROMPT] * len(texts), [TextAnswer(text) for text in texts])


def test_weights_are_added_up_whatever_the_case():
    reward = LexiconReward({"Good": 1, "bad": -2, "don't": 0.5})
    texts = ["Good, GOOD; bad.", "goodness", "I don\u2019t", "I don't", ""]
    np.testing.assert_array_equal(score(reward, *texts), [0, 0, 0, 0.5, 0])


def test_the_average_is_over_all_words():
    reward = LexiconReward({"good": 1}, average=True)
    np.testing.assert_array_equal(score(reward, "good", "so good so good", ""), [1, 0.5, 0])


def test_the_prompt_may_count_too():
    assert score(LexiconReward({"good": 1}, whole_text=True), " a good end") == 2


def test_a_lexicon_has_words():
    with pytest.raises(ValueError, match=r"single words\. Got: 'two words'"):
        LexiconReward({"one": 1, "two words": 1})
    with pytest.raises(ValueError, match="more than case"):
        LexiconReward({"one": 1, "One": 2})


@pytest.mark.needs("vaderSentiment")
def test_vader_gives_its_published_examples():
    # From the package's README.
    texts = [
        "VADER is smart, handsome, and funny.",
        "VADER is VERY SMART, handsome, and FUNNY!!!",
        "VADER is not smart, handsome, nor funny.",
        "The book was kind of good.",
        "",
    ]
    np.testing.assert_allclose(
        score(VaderReward(), *texts), [0.8316, 0.9342, -0.7424, 0.3832, 0], atol=5e-5
    )


def test_vader_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'iro_jax\[vader\]'"):
        VaderReward()
