"""The search makes exactly the choices of a plain-Python oracle, and finds optima."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iro_jax import search as s
from tests.search import oracle
from tests.search.tabular import (
    EOS,
    Tabular,
    all_successors,
    bare_root,
    code,
    keys,
    sampled_successors,
    table_scores,
)

# vocabulary, horizon, K, B, L
SHAPES = [
    (2, 4, 2, 2, 1),
    (2, 8, 4, 4, 2),
    (3, 6, 4, 4, 2),
    (3, 5, 1, 6, 2),
    (3, 5, 4, 1, 2),
    (2, 5, 1, 1, 1),
    (4, 4, 3, 2, 3),
    (6, 3, 2, 3, 1),
    (2, 3, 8, 2, 1),
    (2, 3, 3, 2, 5),
    (3, 6, 2, 3, 4),
    (5, 4, 2, 2, 2),
    (2, 8, 2, 2, 3),
    (4, 5, 2, 4, 1),
]
SELECTIONS = {
    "diversity_first": (s.diversity_first, oracle.distinct_first),
    "top_k": (s.top_k, oracle.best_k),
    "per_parent": (s.per_parent, oracle.best_of_each_row),
}


@functools.cache
def compiled(shape, reuse):
    vocabulary, horizon, width, successors, chunk_length = shape
    branches = [select_fn for select_fn, _ in SELECTIONS.values()]

    @jax.jit
    def run(params, prompt_keys, limit, has_eos, selection):
        return s.search(
            params,
            prompt_keys,
            bare_root(1, num_values=2),
            expand_fn=sampled_successors(chunk_length, has_eos),
            score_fn=table_scores(vocabulary),
            select_fn=functools.partial(jax.lax.switch, selection, branches),
            beam_width=width,
            num_successors=successors,
            chunk_length=chunk_length,
            max_new_tokens=limit,
            capacity=horizon,
            reuse_finished=reuse,
        )

    return run


def tokens_of(answers, entry, row=0):
    return tuple(np.asarray(answers.tokens[row, entry, : answers.lengths[row, entry]]).tolist())


def check(problem, totals, parts, noise, shape, selection, reuse, limit):
    """Runs both and compares everything that they say."""
    vocabulary, _, width, successors, chunk_length = shape
    params = {
        "log_policy": problem.log_policy[None],
        "noise": noise[None],
        "totals": totals[None],
        "parts": parts[None],
    }
    which = list(SELECTIONS).index(selection)
    got = compiled(shape, reuse)(params, keys(1), limit, problem.has_eos, which)
    got = jax.device_get(got)

    def draw(step, row, slot, prefix, i):
        last = prefix[-1] if prefix else vocabulary
        now = problem.log_policy[len(prefix), last]
        token = int(np.argmax(now + noise[step, row * successors + slot, i]))
        return token, float(now[token]), problem.has_eos and token == EOS

    want = oracle.oracle_search(
        draw=draw,
        score=lambda tokens: totals[code(tokens, vocabulary)],
        width=width,
        successors=successors,
        chunk_length=chunk_length,
        limit=limit,
        select=SELECTIONS[selection][1],
        values=2,
        reuse=reuse,
    )
    steps = len(want.selections)
    assert int(got.num_steps[0]) == steps
    assert got.trace.selected[:steps, 0].tolist() == want.selections
    assert int(got.num_tokens[0]) == want.num_tokens
    assert int(got.num_queries[0]) == want.num_queries
    answers = got.finalists
    order = [i for i in got.ranking[0] if answers.valid[0, i]]
    assert [tokens_of(answers, i) for i in order] == [a.tokens for a in want.ranked]
    assert tokens_of(answers, got.best[0]) == want.best.tokens
    assert [tokens_of(got.beams, k) for k in range(width)] == [b.tokens for b in want.beams]
    for i, answer in zip(order, want.ranked, strict=True):
        assert answers.scores.total[0, i] == answer.score
        expected_parts = parts[code(answer.tokens, vocabulary)]
        assert (answers.scores.parts[0, i] == expected_parts).all()
        assert answers.ended[0, i] == answer.ended
        np.testing.assert_allclose(answers.log_probs[0, i].sum(), answer.log_prob, atol=1e-4)
    assert not got.nonfinite.any()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "V{}-H{}-K{}-B{}-L{}".format(*shape))
@settings(
    max_examples=45,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_choices_are_the_oracles(shape, data):
    vocabulary, horizon, width, successors, chunk_length = shape
    selection = data.draw(st.sampled_from(["diversity_first", "diversity_first", *SELECTIONS]))
    reuse = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 2**32 - 1))
    problem = Tabular.random(
        seed,
        vocabulary,
        horizon,
        has_eos=data.draw(st.booleans()),
        levels=data.draw(st.sampled_from([1, 2, 5])),
        spread=data.draw(st.sampled_from([0.0, 1.0, 4.0])),
    )
    limit = data.draw(st.integers(1, horizon))
    rng = np.random.default_rng(seed)
    steps = -(-horizon // chunk_length)
    noise = rng.gumbel(size=(steps, width * successors, chunk_length, vocabulary))
    if data.draw(st.booleans()):
        noise[:] = noise[:1, :1]  # all slots draw alike: duplicates everywhere
    if data.draw(st.booleans()):
        noise[..., EOS] += 2.0
    second = {answer: float(rng.integers(3)) for answer in problem.rewards}
    values = [problem.code_table(problem.values(r)) for r in (problem.rewards, second)]
    parts = np.stack(values, axis=-1)
    totals = parts[:, 0] / np.float32(1.0) + parts[:, 1] / np.float32(2.0)
    if data.draw(st.booleans()):
        totals = np.round(totals)  # ties between prefixes
    check(problem, totals, parts, noise.astype(np.float32), shape, selection, reuse, limit)


@pytest.mark.parametrize("has_eos", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 8, 2, 1), (2, 6, 16, 4, 2), (3, 4, 27, 3, 1), (2, 5, 8, 8, 3), (4, 3, 16, 4, 1)],
)
def test_an_enumerating_search_that_covers_the_tree_finds_the_optimum(shape, has_eos):
    vocabulary, horizon, width, successors, chunk_length = shape

    @jax.jit
    def run(params):
        return s.search(
            params,
            keys(1),
            bare_root(1),
            expand_fn=all_successors(vocabulary, chunk_length, has_eos),
            score_fn=table_scores(vocabulary),
            beam_width=width,
            num_successors=successors,
            chunk_length=chunk_length,
            max_new_tokens=horizon,
        )

    for seed in range(10):
        problem = Tabular.random(seed, vocabulary, horizon, has_eos=has_eos, levels=1000)
        # Misleading values: only the leaves tell, so that covering the tree is what finds it.
        values = {
            prefix: value if problem.is_complete(prefix) else -value
            for prefix, value in problem.values().items()
        }
        table = problem.code_table(values)
        output = run({"totals": table[None], "parts": table[None, :, None]})
        best = tokens_of(output.finalists, output.best[0])
        assert problem.rewards[best] == max(problem.rewards.values())


def test_figure_2_of_the_paper():
    """K = 1, B = 2, L = 1 visits 8 nodes of the tree whose 30 nodes best-of-N must see."""
    problem = Tabular.random(3, 2, 4, has_eos=False, levels=1000)
    # V* of Figure 2: the best reward that can still be reached.
    optimal = {
        prefix: max(r for answer, r in problem.rewards.items() if answer[: len(prefix)] == prefix)
        for prefix in problem.values()
    }
    table = jnp.asarray(problem.code_table(optimal))
    output = s.search(
        {"totals": table[None], "parts": table[None, :, None]},
        keys(1),
        bare_root(1),
        expand_fn=all_successors(2, 1, False),
        score_fn=table_scores(2),
        beam_width=1,
        num_successors=2,
        chunk_length=1,
        max_new_tokens=4,
    )
    best = tokens_of(output.finalists, output.best[0])
    assert problem.rewards[best] == max(problem.rewards.values())
    assert len(best) == 4
    assert int(output.num_tokens[0]) == int(output.trace.new.sum()) == 8
    assert len(optimal) - 1 == 30  # every node below the root
