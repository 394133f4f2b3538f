"""Prompts that enter and leave a batch get the answers that they get by themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models import prompt_keys
from tests.guidance.cases import batch, guided, guided_params, prompts, scored

CASES = scored()
NUMBER, ROWS = 11, 3


def of_any_length(scorer):
    """A search whose answers end after one to four chunks."""
    return dataclasses.replace(guided(scorer), eos_ids=tuple(range(2, 14)))


def whole(search, params, keys, tokens, mask):
    """All prompts in one batch, as one program."""
    return jax.device_get(jax.jit(search)(params, keys, tokens, mask))


@pytest.mark.parametrize(
    "name",
    [
        *("two networks", "adapters", "log-ratio"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("nothing", "shared backbone")),
    ],
)
def test_answers_are_those_of_one_batch(name):
    scorer, scorer_params = CASES[name]
    search, params = of_any_length(scorer), guided_params(scorer_params)
    tokens, mask = batch(prompts(NUMBER))
    keys = prompt_keys(0, [str(i) for i in range(NUMBER)])
    expected = whole(search, params, keys, tokens, mask)
    assert len(set(expected.num_steps.tolist())) > 1  # or nobody would enter alone

    continuous = search.continuous(ROWS)
    found = dict(continuous(params, keys, (tokens, mask), max_new_tokens=search.capacity))
    assert sorted(found) == list(range(NUMBER))
    for index, output in found.items():
        np.testing.assert_array_equal(output.num_steps[0], expected.num_steps[index])
        np.testing.assert_array_equal(output.num_tokens[0], expected.num_tokens[index])
        np.testing.assert_array_equal(output.num_queries[0], expected.num_queries[index])
        np.testing.assert_array_equal(output.ranking[0], expected.ranking[index])
        got, wanted = output.finalists, expected.finalists
        np.testing.assert_array_equal(got.tokens[0], wanted.tokens[index])
        np.testing.assert_allclose(got.scores.parts[0], wanted.scores.parts[index], atol=1e-4)
        # Which of two equal candidates survives is up to rounding; what they say is not.
        np.testing.assert_array_equal(output.trace.tokens[:, 0], expected.trace.tokens[:, index])


def test_waiting_prompts_take_the_rows_of_those_that_are_done():
    scorer, scorer_params = CASES["nothing"]
    search, params = of_any_length(scorer), guided_params(scorer_params)
    tokens, mask = batch(prompts(NUMBER))
    keys = prompt_keys(0, [str(i) for i in range(NUMBER)])
    steps = whole(search, params, keys, tokens, mask).num_steps
    continuous = search.continuous(ROWS)
    taken = []
    step = continuous._step
    continuous._step = lambda *arguments: (taken.append(1), step(*arguments))[1]
    list(continuous(params, keys, (tokens, mask), max_new_tokens=search.capacity))
    in_turn = sum(max(steps[i : i + ROWS]) for i in range(0, NUMBER, ROWS))
    assert sum(steps) / ROWS <= len(taken) < in_turn
    assert continuous._admit._cache_size() == continuous._start._cache_size() == 1
    assert step._cache_size() == 1


def test_a_batch_larger_than_the_prompts():
    scorer, scorer_params = CASES["policy heads"]
    search, params = of_any_length(scorer), guided_params(scorer_params)
    tokens, mask = batch(prompts(2))
    keys = prompt_keys(0, ["0", "1"])
    expected = whole(search, params, keys, tokens, mask)
    found = dict(search.continuous(5)(params, keys, (tokens, mask), max_new_tokens=16))
    for index in (0, 1):
        np.testing.assert_array_equal(
            found[index].finalists.tokens[0], expected.finalists.tokens[index]
        )


def test_a_memory_that_cannot_take_prompts_in_is_named():
    class Stubborn:
        def commit(self, parents):
            return self

    from iro_jax.search import start
    from iro_jax.search.continuous import admit
    from iro_jax.search.types import Root, Scores

    def state(number):
        scores = Scores(jnp.zeros(number), jnp.zeros((number, 1)))
        keys = prompt_keys(0, [str(i) for i in range(number)])
        return start(
            keys,
            Root(Stubborn(), None, scores),
            beam_width=1,
            num_successors=1,
            chunk_length=1,
            max_new_tokens=1,
        )

    with pytest.raises(TypeError, match="Stubborn has no `admit`"):
        admit(state(2), jnp.array([0]), state(1))
