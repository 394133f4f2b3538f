"""What a guided search compiles to, how often, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax import search as s
from iro_jax.guidance import (
    Guide,
    GuidedSearch,
    LogRatio,
    NoScore,
    PolicyHeads,
    ValueSum,
    ValueSumParams,
)
from iro_jax.models import Pretrained, Sampling, generate, prompt_keys
from iro_jax.models.generate import bucket_groups
from iro_jax.models.stop import cut, stop_table
from iro_jax.models.token_bytes import token_bytes
from iro_jax.testing import tiny_network, word_tokenizer
from iro_jax.values import Head, ValueNetwork
from tests.guidance.cases import (
    EOS,
    POLICY,
    batch,
    guided,
    guided_params,
    prompts,
    scored,
    weights,
)

SCORED = scored()
HOST_WORDS = ("callback", "infeed", "outfeed", " send(", " recv(")
WORDS = [f"w{i}" for i in range(55)]


@pytest.mark.parametrize("name", SCORED)
def test_a_search_is_one_program_that_never_calls_the_host(name):
    scorer, scorer_params = SCORED[name]
    table = stop_table(["w5 w6"], token_bytes(word_tokenizer(WORDS), 64))
    params = guided_params(scorer_params, stop_table=jnp.asarray(table))
    tokens, mask = batch(prompts(2))
    run = jax.jit(guided(scorer))
    compiled = run.lower(params, prompt_keys(0, ["a", "b"]), tokens, mask).compile()
    text = compiled.as_text()
    for word in HOST_WORDS:
        assert word not in text
    output = compiled(params, prompt_keys(0, ["a", "b"]), tokens, mask)
    assert np.asarray(output.finalists.valid).any(axis=-1).all()


def test_the_words_are_those_of_a_host_call():
    def f(x):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    text = jax.jit(f).lower(jnp.ones(3)).compile().as_text()
    assert any(word in text for word in HOST_WORDS)


def pretrained(tmp_path):
    return Pretrained(POLICY, weights(POLICY, 0), word_tokenizer(WORDS), EOS, {}, tmp_path)


SMALL = {"beam_width": 2, "num_successors": 2, "chunk_length": 4, "max_new_tokens": 12}


def test_one_compilation_for_each_bucket(tmp_path):
    scorer, scorer_params = SCORED["policy heads"]
    guide = Guide(pretrained(tmp_path), scorer, scorer_params, batch_size=4, **SMALL)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=n)) for n in (3, 40, 5, 33, 20, 8, 60, 31, 2)]
    assert len(guide(texts, seed=0)) == 9
    assert guide._programs[0][1]._cache_size() == 2
    guide(texts[::-1], seed=1)
    assert guide._programs[0][1]._cache_size() == 2


def test_max_new_tokens_is_traced():
    run = jax.jit(guided(NoScore()))
    tokens, mask = batch(prompts(2))
    keys = prompt_keys(0, ["a", "b"])
    for limit in (3, 9, 16):
        output = run(guided_params(None), keys, tokens, mask, jnp.int32(limit))
        found = output.finalists
        assert int(jnp.max(found.lengths)) <= limit
        cut_short = found.valid & ~found.ended
        assert (found.lengths[cut_short] == limit).all()
    limits = jnp.array([2, 11])
    output = run(guided_params(None), keys, tokens, mask, limits)
    assert (jnp.max(output.finalists.lengths, axis=-1) <= limits).all()
    assert run._cache_size() == 2  # a scalar and a vector


def test_without_scores_and_in_one_chunk_the_search_is_plain_sampling():
    """Best-of-N and `generate` draw the same answers from the same keys."""
    sampling = Sampling(0.9, top_k=20)
    tokens, mask = batch(prompts(3))
    keys = prompt_keys(5, ["a", "b", "c"])
    params = guided_params(None)
    search = GuidedSearch(
        POLICY, NoScore(), sampling, EOS, 1, num_successors=6, chunk_length=12, capacity=12
    )
    output = jax.jit(search)(params, keys, tokens, mask)
    plain = jax.jit(
        functools.partial(
            generate, POLICY, sampling=sampling, eos_ids=EOS, max_new_tokens=12, num_samples=6
        )
    )(params.policy, keys, tokens, mask)
    found = output.finalists
    for row in range(3):
        searched = sorted(
            tuple(found.tokens[row, i].tolist())
            for i in range(found.valid.shape[1])
            if found.valid[row, i]
        )
        assert searched == sorted(tuple(answer.tolist()) for answer in plain.tokens[row])
    np.testing.assert_allclose(
        np.sort(np.where(found.valid, found.log_probs.sum(-1), np.inf), axis=-1)[:, :6],
        np.sort(plain.log_probs.sum(-1), axis=-1),
        atol=1e-4,
    )


def test_beam_step_by_step_is_the_search():
    scorer, scorer_params = SCORED["shared backbone"]
    search, params = guided(scorer), guided_params(scorer_params)
    tokens, mask = batch(prompts(2))
    keys = prompt_keys(0, ["a", "b"])
    whole = jax.jit(search)(params, keys, tokens, mask)
    sizes = {"beam_width": 3, "num_successors": 2, "chunk_length": 4}
    state = s.start(keys, search.root(params, tokens, mask), max_new_tokens=16, **sizes)
    step = jax.jit(
        functools.partial(s.beam_step, expand_fn=search.expand_fn, score_fn=search.scorer)
    )
    while s.unfinished(state):
        state = step(params, keys, state)
    output = s.finish(state)
    np.testing.assert_array_equal(whole.finalists.tokens, output.finalists.tokens)
    np.testing.assert_array_equal(whole.ranking, output.ranking)


def test_stop_strings_end_answers(tmp_path):
    stops = ["w7", "w1 w2"]
    free = Guide(pretrained(tmp_path), **SMALL)
    stopped = Guide(pretrained(tmp_path), stop_strings=stops, **SMALL)
    texts = [" ".join(WORDS[i : i + 5]) for i in range(24)]
    ended = 0
    for found in stopped(texts):
        for answer in found.answers:
            assert all(stop not in answer.text for stop in stops)
            whole = stopped.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            assert answer.text == cut(whole, stops)
            hit = any(stop in whole for stop in stops)
            # Nothing follows the token that completes a stop string.
            before = stopped.tokenizer.decode(answer.tokens[:-1], skip_special_tokens=True)
            assert not any(stop in before for stop in stops)
            assert answer.finished == (hit or answer.tokens[-1] in EOS)
            ended += hit
    assert ended > 3
    assert any("w7" in answer.text for found in free(texts) for answer in found.answers)


def test_the_answer_is_picked_by_value_by_reward_or_by_vote(tmp_path):
    scorer, scorer_params = SCORED["policy heads"]
    texts = [" ".join(WORDS[i : i + 5]) for i in range(6)]
    bind = functools.partial(Guide, pretrained(tmp_path), scorer, scorer_params, **SMALL)

    by_value = bind()(texts)
    for found in by_value:
        scores = [answer.score for answer in found.answers]
        assert scores == sorted(scores, reverse=True)

    def reward(prompts, answers):
        return [len(answer) for answer in answers]

    for found, before in zip(
        bind(final_selection="reward", reward=reward)(texts), by_value, strict=True
    ):
        assert found.answers[0].reward == max(len(a.text) for a in before.answers)
        assert {a.tokens for a in found.answers} == {a.tokens for a in before.answers}

    def first_word(text):
        return text.split()[0] if text.split() else None

    for found in bind(final_selection="majority", vote=first_word)(texts):
        votes = [first_word(a.text) for a in found.answers]
        counted = [v for v in votes if v is not None]
        assert counted.count(votes[0]) == max(map(counted.count, counted))


def test_majority_counts_and_breaks_ties_towards_the_first_seen():
    assert s.majority(["b", "a", "a", None, "b"]) == [0, 4, 1, 2, 3]
    assert s.majority(["b", "a", "a", None, "a"]) == [1, 2, 4, 0, 3]
    assert s.majority(["b", "a", "a"], weights=[3.0, 1.0, 1.0]) == [0, 1, 2]


def test_choose_ranks_by_rewards():
    output = jax.jit(guided(NoScore()))(
        guided_params(None), prompt_keys(0, ["a", "b"]), *batch(prompts(2))
    )
    rewards = np.where(output.finalists.valid, np.arange(output.finalists.valid.shape[1]), 99.0)
    chosen = s.choose(output, rewards)
    for row in range(2):
        valid = np.flatnonzero(output.finalists.valid[row])
        assert chosen.ranking[row, : valid.size].tolist() == valid[::-1].tolist()
    with pytest.raises(ValueError, match=r"NaN in prompts \[0, 1\]"):
        s.choose(output, jnp.full(rewards.shape, jnp.nan))


@pytest.mark.parametrize("beta", [jnp.nan, 0.0])
def test_scores_that_are_no_numbers_are_reported_with_their_prompt(beta):
    scorer, scorer_params = SCORED["policy heads"]
    broken = dataclasses.replace(scorer_params, betas=scorer_params.betas.at[1].set(beta))
    search, params = guided(scorer), guided_params(broken)
    tokens, mask = batch(prompts(2))
    keys = prompt_keys(0, ["a", "b"])
    output = jax.jit(search)(params, keys, tokens, mask)
    assert output.nonfinite.tolist() == [True, True]
    with pytest.raises(ValueError, match=r"NaN or infinite.*prompts \[0, 1\]"):
        s.check_scores(output)
    with pytest.raises(ValueError, match=r"NaN or infinite.*prompts \[0, 1\]"):
        search(params, keys, tokens, mask)
    with pytest.raises(ValueError, match="NaN or infinite"):
        search.on_host()(params, keys, search.root(params, tokens, mask))


def test_a_guide_reports_scores_that_are_no_numbers(tmp_path):
    scorer, scorer_params = SCORED["policy heads"]
    broken = dataclasses.replace(scorer_params, betas=jnp.full(3, jnp.nan))
    for driver in ("program", "host", "continuous"):
        guide = Guide(pretrained(tmp_path), scorer, broken, driver=driver, **SMALL)
        with pytest.raises(ValueError, match="NaN or infinite"):
            guide(["w1 w2"])


def nan_reward(prompts, answers):
    return [float("nan") for _ in answers]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_width": 0}, "beam_width must be at least 1. Got: 0"),
        ({"num_successors": 0}, "num_successors must be at least 1. Got: 0"),
        ({"chunk_length": 0}, "chunk_length must be at least 1. Got: 0"),
        ({"capacity": 0}, "capacity must be at least 1. Got: 0"),
        ({"eos_ids": (64,)}, "eos_ids must be below 64"),
        ({"policy": tiny_network(head="score")}, "A policy needs a language-model head"),
        (
            {"scorer": ValueSum((ValueNetwork(tiny_network(vocab_size=63, head="score")),))},
            "does not know the policy's vocabulary of 64 tokens",
        ),
        ({"scorer": LogRatio(POLICY, tiny_network(vocab_size=63))}, "the policy's vocabulary"),
        ({"scorer": PolicyHeads((Head(),), (3,))}, r"a layer in 0\.\.2. Got: \(3,\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(guided(NoScore()), **changes)


def test_arguments_that_cannot_work_are_refused(tmp_path):
    search, params = guided(NoScore()), guided_params(None)
    tokens, mask = batch(prompts(2))
    keys = prompt_keys(0, ["a", "b"])
    with pytest.raises(ValueError, match="an empty batch"):
        search(params, keys[:0], tokens[:0], mask[:0])
    with pytest.raises(ValueError, match=r"max_new_tokens must be in 1\.\.16"):
        search(params, keys, tokens, mask, 17)
    with pytest.raises(ValueError, match=r"max_new_tokens must be in 1\.\.16"):
        search(params, keys, tokens, mask, 0)
    scorer, scorer_params = SCORED["two networks"]
    one_beta = ValueSumParams(scorer_params.networks, jnp.ones(1))
    with pytest.raises(ValueError, match="one beta for each of the 2 value functions"):
        guided(scorer)(guided_params(one_beta), keys, tokens, mask)
    with pytest.raises(ValueError, match="A sum needs at least one value network"):
        ValueSum(())
    guide = Guide(pretrained(tmp_path), final_selection="reward", reward=nan_reward, **SMALL)
    with pytest.raises(ValueError, match="A reward must be a number"):
        guide(["w1"])
    for settings in ({"final_selection": "reward"}, {"final_selection": "majority"}):
        with pytest.raises(ValueError, match="belong together"):
            Guide(pretrained(tmp_path), **settings)
    with pytest.raises(ValueError, match="leave room for a prompt"):
        Guide(pretrained(tmp_path), max_new_tokens=128)


def test_noise_of_another_shape_is_refused():
    search, (tokens, mask) = guided(NoScore()), batch(prompts(2))
    keys = prompt_keys(0, ["a", "b"])
    for shape in ((15, 2, 6, 64), (16, 2, 3, 128), (16, 1, 6, 64)):
        params = guided_params(None, noise=jnp.zeros(shape))
        with pytest.raises(ValueError, match=r"\[16, 2, 6, 64\]. Got"):
            jax.eval_shape(search, params, keys, tokens, mask)


def test_the_loop_itself_refuses_what_cannot_work():
    root = s.Root(None, None, s.Scores(jnp.zeros(1), jnp.zeros((1, 0))))
    keys = prompt_keys(0, ["a"])
    sizes = {"beam_width": 1, "num_successors": 1, "chunk_length": 1, "max_new_tokens": 4}
    for name in sizes:
        with pytest.raises(ValueError, match=f"{name} must be at least 1. Got: 0"):
            s.start(keys, root, **(sizes | {name: 0}))
    with pytest.raises(ValueError, match="needs one key for each prompt"):
        s.start(keys[:0], root, **sizes)
    with pytest.raises(ValueError, match="needs a static capacity"):
        s.start(keys, root, **(sizes | {"max_new_tokens": jnp.int32(4)}))

    def wrong_shape(params, keys, frontier):
        empty = jnp.zeros((1, 1, 1, 2))
        return s.Chunk(empty.astype(int), jnp.ones((1, 1, 1), int), empty[..., 0] > 0, empty), None

    with pytest.raises(ValueError, match=r"chunk_length\] = \[1, 1, 1, 1\]. Got: \[1, 1, 1, 2\]"):
        s.search(None, keys, root, expand_fn=wrong_shape, score_fn=NoScore(), **sizes)


def test_kernels_give_the_same_answers():
    """Attention over the shared prefix and the fused draw, interpreted, in a whole search."""
    scorer, scorer_params = SCORED["policy heads"]
    tokens, mask = batch(prompts(2))
    keys, params = prompt_keys(0, ["a", "b"]), guided_params(scorer_params)
    plain = guided(scorer, capacity=8)
    kernels = dataclasses.replace(POLICY, kernels="interpret")
    expected, found = (
        jax.jit(dataclasses.replace(plain, policy=policy))(params, keys, tokens, mask)
        for policy in (POLICY, kernels)
    )
    np.testing.assert_array_equal(found.finalists.tokens, expected.finalists.tokens)
    np.testing.assert_allclose(found.finalists.log_probs, expected.finalists.log_probs, atol=1e-4)


def test_a_guide_that_is_driven_continuously_answers_alike(tmp_path):
    asked = [" ".join(WORDS[: 1 + 7 * i % 40]) for i in range(7)]
    guides = [
        Guide(pretrained(tmp_path), driver=driver, batch_size=3, **SMALL)
        for driver in ("auto", "continuous")
    ]
    expected, found = (guide(asked, seed=3) for guide in guides)
    assert [guided.text for guided in found] == [guided.text for guided in expected]
    assert [guided.num_tokens for guided in found] == [guided.num_tokens for guided in expected]


def test_prompts_of_one_bucket_are_read_together():
    rendered = [(np.zeros(length, np.int32),) for length in (3, 40, 200, 10, 33, 5)]
    assert list(bucket_groups(rendered, 2)) == [[2], [1, 4], [0, 3, 5]]
    assert list(bucket_groups(rendered, 3)) == [[2, 1, 4], [0, 3, 5]]
    assert list(bucket_groups(rendered, 4)) == [[2, 1, 4, 0, 3, 5]]
