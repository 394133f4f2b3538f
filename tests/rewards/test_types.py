"""What counts as an answer, and what a reward may return."""

import numpy as np
import pytest

from iro_jax.data import Prompt
from iro_jax.guidance import GuidedAnswer
from iro_jax.models import Completion
from iro_jax.rewards import Answer, CallableReward, TextAnswer, check_rewards
from iro_jax.rewards.types import read_text

PROMPTS = [Prompt("first", "a"), Prompt("second", "b")]


def test_completions_and_guided_answers_are_answers():
    completion = Completion("text", (1, 2), True, -1.0)
    guided = GuidedAnswer("text", (1, 2), True, -1.0, 0.5, (0.5,))
    assert all(isinstance(answer, Answer) for answer in (completion, guided, TextAnswer("text")))
    assert not isinstance("text", Answer)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_a_reward_that_is_not_finite_names_its_prompt(bad):
    with pytest.raises(ValueError, match=r"prompt 'second' must be a finite number\. Got: "):
        check_rewards([0.0, bad], PROMPTS)


@pytest.mark.parametrize("bad", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], 1.0])
def test_there_is_one_reward_for_each_answer(bad):
    with pytest.raises(ValueError, match=r"one reward for each of 2 answers\. Got: .*shape"):
        check_rewards(bad, PROMPTS)


def test_rewards_are_numbers_of_32_bits():
    rewards = check_rewards([True, 1 / 3], PROMPTS)
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, np.float32([1, 1 / 3]))
    with pytest.raises(ValueError, match="must be numbers"):
        check_rewards(["good", "bad"], PROMPTS)


def test_text_with_its_prompt():
    chat = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
    ]
    answer = TextAnswer(" and more")
    assert read_text(Prompt("p", "A start"), answer, whole_text=True) == "A start and more"
    assert read_text(Prompt("p", chat), answer, whole_text=True) == "second question\n and more"
    assert read_text(Prompt("p", chat), answer, whole_text=False) == " and more"


class TestCallableReward:
    def test_gets_the_conversation_and_the_text(self):
        reward = CallableReward(lambda conversation, text: len(conversation) + 10 * len(text))
        prompts = [Prompt("p", "abc"), Prompt("q", [{"role": "user", "content": "abc"}])]
        np.testing.assert_array_equal(reward(prompts, [TextAnswer("xy")] * 2), [23, 21])

    def test_a_batched_function_gets_all_of_them(self):
        def lengths(conversations, texts):
            assert conversations == ["a", "b"]
            return [len(text) for text in texts]

        reward = CallableReward(lengths, batched=True)
        np.testing.assert_array_equal(reward(PROMPTS, [TextAnswer("x"), TextAnswer("xyz")]), [1, 3])

    def test_what_it_raises_is_noted_with_the_prompt(self):
        def fail(conversation, text):
            raise KeyError(text)

        with pytest.raises(KeyError) as caught:
            CallableReward(fail)(PROMPTS, [TextAnswer("x")] * 2)
        assert "prompt 'first'" in caught.value.__notes__[0]

    def test_every_answer_needs_a_prompt(self):
        with pytest.raises(ValueError, match="Got: 2 prompts and 1 answers"):
            CallableReward(lambda *pair: 0.0)(PROMPTS, [TextAnswer("x")])

    def test_nothing_to_score(self):
        assert CallableReward(lambda *pair: 0.0)([], []).shape == (0,)
