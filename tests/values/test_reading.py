"""Hidden states behind every prefix are those of a pass over the whole text."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from iro_jax.values import FunctionReward, Head, StateCache, StateReader, new_head
from iro_jax.values.prefixes import group_by_prompt, head_values
from tests.values import cases

MODEL = cases.model()
# Larger weights would make rounding errors grow from layer to layer.
MODEL = dataclasses.replace(MODEL, params=jax.tree.map(lambda x: x / 2, MODEL.params))


def groups(*sizes, seed=0):
    """So many answers to each of some prompts, of lengths 0 to 16."""
    rng = np.random.default_rng(seed)

    def tokens(low, high):
        return rng.integers(4, 49, rng.integers(low, high))

    made = [(tokens(1, 33), [tokens(1, 16) for _ in range(size)]) for size in sizes]
    made[0][1][:2] = tokens(16, 17), tokens(0, 1)
    return made


def whole(prompt, answer, depth):
    """One text at a time, on the other side of its padding."""
    tokens = np.zeros((1, 50), np.int32)
    text = np.concatenate([prompt, answer])
    tokens[0, 50 - len(text) :] = text
    outputs = FORWARD(MODEL.params, tokens, np.arange(50)[None] >= 50 - len(text), want=(depth,))
    return np.asarray(outputs.at(depth))[0, -len(answer) - 1 :]


FORWARD = jax.jit(MODEL.network.forward, static_argnames="want")


@pytest.mark.parametrize("depth", ["hidden", 1])
def test_states_after_the_prompt_and_each_token_of_its_answers(depth):
    some = groups(2, 7, 0, 1, 3)
    reader = StateReader(MODEL.network, depth, rows=2, answers=3)
    for (prompt, answers), found in zip(some, reader(MODEL.params, some), strict=True):
        assert [len(states) for states in found] == [len(answer) + 1 for answer in answers]
        for answer, states in zip(answers, found, strict=True):
            want = whole(prompt, answer, depth)
            assert np.std(want) > 0.1
            np.testing.assert_allclose(states, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_same_call_gives_the_same_bits():
    some = groups(2, 5)
    reader = StateReader(MODEL.network, 1, rows=2, answers=3)
    once = reader(MODEL.params, some)
    again = StateReader(MODEL.network, 1, rows=2, answers=3)(MODEL.params, groups(2, 5))
    for a, b in zip(itertools.chain(*once), itertools.chain(*again), strict=True):
        assert a.tobytes() == b.tobytes()


class TestStateCache:
    def test_what_was_read_is_not_read_again(self):
        calls = []

        class Counting(StateReader):
            def __call__(self, params, some):
                calls.append(len(some))
                return super().__call__(params, some)

        cache = StateCache(MODEL, 1, Counting(MODEL.network, 1, rows=2, answers=3))
        first = cache(groups(2, 2))
        again = cache(groups(2, 2))
        for a, b in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
            assert a.tobytes() == b.tobytes()
        assert calls == [2]
        cache(groups(2, 2, seed=1))
        prompt, answers = groups(2)[0]
        cache([(prompt, answers)])
        # The same tokens, of which one more belongs to the prompt.
        cache([(np.append(prompt[1:], answers[0][:1]), [answers[0][1:], answers[1]])])
        cache(groups(3), keep=False)
        cache(groups(3))
        assert calls == [2, 2, 1, 1, 1, 1]

    def test_whom_it_serves(self):
        head = new_head(MODEL, Head(), layer=1)
        assert StateCache(MODEL, 1).serves(head)
        assert not StateCache(MODEL, None).serves(head)
        assert not StateCache(cases.model(), 1).serves(head)
        assert not StateCache(head.model, 1).serves(new_head(cases.model(), Head(), layer=1))
        score = cases.score_function()
        assert not StateCache(score.model, None).serves(score)


class TestReward:
    FUNCTION = new_head(MODEL, Head((8,)), layer=1)

    def test_is_the_value_of_the_complete_answer(self):
        rollouts = cases.rollouts(3, 2)
        reward = FunctionReward(self.FUNCTION, cases.answer_tokens(), StateCache(MODEL, 1))
        found = reward([rollout.prompt for rollout in rollouts], rollouts)
        want = [
            cases.whole_values(self.FUNCTION, rollout.prompt_tokens, rollout.tokens)[-1]
            for rollout in rollouts
        ]
        assert found.dtype == np.float32
        assert np.std(want) > 1e-3
        np.testing.assert_allclose(found, want, atol=1e-5)

    def test_needs_the_states_that_it_reads(self):
        with pytest.raises(ValueError, match="layer 1, states of hidden"):
            FunctionReward(self.FUNCTION, cases.answer_tokens(), StateCache(MODEL, None))


def test_neighbours_with_one_prompt_are_one_group():
    a, b = np.array([5, 6]), np.array([5])
    answers = [np.array([n]) for n in range(4)]
    found = group_by_prompt(list(zip([a, a, b, a], answers, strict=True)))
    assert [(list(prompt), [list(x) for x in some]) for prompt, some in found] == [
        ([5, 6], [[0], [1]]),
        ([5], [[2]]),
        ([5, 6], [[3]]),
    ]


def test_values_of_states():
    function = new_head(MODEL, Head((8,), output="sigmoid"))
    states = [np.random.default_rng(n).normal(size=(n, 16)).astype(np.float32) for n in (3, 1, 5)]
    found = head_values(function, states)
    assert [len(values) for values in found] == [3, 1, 5]
    want = function.network.head(function.params.head, states[2])[:, 0]
    np.testing.assert_allclose(found[2], want, atol=1e-6)
    assert head_values(function, []) == []
