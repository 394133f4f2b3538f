"""Every method's choices against a plain reading of its formula, on tabular models."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from iro_jax import methods, search
from tests.search import oracle
from tests.search.tabular import (
    EOS,
    Tabular,
    bare_root,
    code,
    keys,
    sampled_successors,
    table_scores,
)

VOCABULARY, HORIZON = 4, 3
CHAINS = 6000


def top_successors(count, has_eos):
    """`expand_fn`: the most probable tokens behind every beam, as `TopTokens` of a network."""

    def expand_fn(params, keys, frontier):
        del keys
        log_policy = params["log_policy"]
        beams = frontier.beams
        lasts = jnp.maximum(beams.lengths - 1, 0)[..., None]
        last = jnp.take_along_axis(beams.tokens, lasts, axis=-1)[..., 0]
        last = jnp.where(beams.lengths > 0, last, log_policy.shape[-1])
        position = jnp.minimum(beams.lengths, log_policy.shape[1] - 1)
        rows = jnp.arange(log_policy.shape[0])[:, None]
        log_probs, tokens = jax.lax.top_k(log_policy[rows, position, last], count)
        ones = jnp.ones(tokens.shape, jnp.int32)
        ended = (tokens == EOS) & has_eos
        return search.Chunk(tokens[..., None], ones, ended, log_probs[..., None]), None

    return expand_fn


def problem(seed=0, **options):
    return Tabular.random(seed, VOCABULARY, HORIZON, **options)


def prefix_scores(tabular, seed=0):
    """What a reward model says of every prefix: anything."""
    rng = np.random.default_rng(seed)
    return {prefix: float(rng.normal()) for prefix in tabular.values()}


def run(method, tabular, scores, *, seed=0):
    """The method's K beams, as tuples of tokens; `scores` of prefixes, not yet weighted."""
    table = tabular.code_table({prefix: method.weight * s for prefix, s in scores.items()})[None]
    length = method.chunk_length or HORIZON
    if method.successors == "top_tokens":
        expand_fn = top_successors(method.num_successors, tabular.has_eos)
    else:
        expand_fn = sampled_successors(length, tabular.has_eos)
    score_fn = table_scores(VOCABULARY)
    root = bare_root(1, totals=[method.weight * scores[()]])
    noise = gumbel(seed, -(-HORIZON // length), method.beam_width * method.num_successors, length)
    params = {
        "log_policy": jnp.asarray(tabular.log_policy[None]),
        "noise": jnp.asarray(noise[None]),
        "totals": jnp.asarray(table),
        "parts": jnp.asarray(table[..., None]),
    }
    go = jax.jit(
        functools.partial(
            search.search,
            expand_fn=expand_fn,
            score_fn=score_fn,
            select_fn=method.select_fn,
            beam_width=method.beam_width,
            num_successors=method.num_successors,
            chunk_length=length,
            max_new_tokens=HORIZON,
        )
    )
    output = jax.device_get(go(params, keys(1, seed), root))
    beams = [
        tuple(tokens[:length].tolist())
        for tokens, length in zip(output.beams.tokens[0], output.beams.lengths[0], strict=True)
    ]
    return beams, output, noise


def gumbel(seed, steps, candidates, length):
    rng = np.random.default_rng(seed)
    shape = (steps, candidates, length, VOCABULARY)
    return rng.gumbel(size=shape).astype(np.float32)


def distribution(tabular, step_probabilities):
    """Probabilities of all answers when tokens are chosen with `step_probabilities(prefix)`."""
    return {
        answer: math.prod(step_probabilities(answer[:i])[t] for i, t in enumerate(answer))
        for answer in tabular.answers()
    }


def check_draws(beams, expected):
    """Chi-square of the beams, K independent draws, against probabilities of answers."""
    assert sum(expected.values()) == pytest.approx(1)
    counts = dict.fromkeys(expected, 0)
    for beam in beams:
        counts[beam] += 1
    common = [answer for answer, p in expected.items() if p * len(beams) >= 5]
    rest = len(beams) - sum(counts[answer] for answer in common)
    rest_expected = len(beams) * (1 - sum(expected[answer] for answer in common))
    observed = [counts[answer] for answer in common]
    wanted = [len(beams) * expected[answer] for answer in common]
    if rest_expected > 1:
        observed, wanted = [*observed, rest], [*wanted, rest_expected]
    else:
        assert rest <= 8
        wanted = [w * sum(observed) / sum(wanted) for w in wanted]
    assert len(wanted) > 5, "too few answers to tell distributions apart"
    assert scipy.stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def top_tokens(tabular, prefix, k):
    log_probs = tabular.step_log_probs(prefix)
    return sorted(range(VOCABULARY), key=lambda token: (-log_probs[token], token))[:k]


def softmax_over(tokens, logits):
    weights = {token: math.exp(logit) for token, logit in zip(tokens, logits, strict=True)}
    total = sum(weights.values())
    return {token: weights.get(token, 0.0) / total for token in range(VOCABULARY)}


@pytest.mark.parametrize("k", [2, 3, VOCABULARY])
def test_args_takes_the_largest_logit_plus_reward(k):
    method = methods.args(weight=1.5, k=k)
    for seed in range(12):
        tabular = problem(seed)
        scores = prefix_scores(tabular, seed)
        answer = ()
        while not tabular.is_complete(answer):
            logits = tabular.step_log_probs(answer) + 7.0  # any constant of the state
            answer = max(
                ((*answer, token) for token in top_tokens(tabular, answer, k)),
                key=lambda prefix: logits[prefix[-1]] + 1.5 * scores[prefix],
            )
        assert run(method, tabular, scores)[0] == [answer]


def draws_of_args(log_probs, scores):
    return [
        (log_prob + 1.5 * score) / 0.7 for log_prob, score in zip(log_probs, scores, strict=True)
    ]


def draws_of_controlled_decoding(log_probs, scores):
    return [log_prob + 2.0 * score for log_prob, score in zip(log_probs, scores, strict=True)]


def draws_of_value_augmentation(log_probs, scores):
    mean = np.mean(scores)
    return [log_prob + 3.0 * (s - mean) for log_prob, s in zip(log_probs, scores, strict=True)]


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        (methods.args(1.5, 3, temperature=0.7, chains=CHAINS), draws_of_args),
        (methods.controlled_decoding(2.0, 3, CHAINS), draws_of_controlled_decoding),
        (methods.value_augmented(3.0, 3, CHAINS), draws_of_value_augmentation),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_token_wise_draws_follow_their_formula(method, formula):
    tabular = problem(1)
    scores = {prefix: 0.5 * score for prefix, score in prefix_scores(tabular, 1).items()}

    def step(prefix):
        tokens = top_tokens(tabular, prefix, method.num_successors)
        log_probs = tabular.step_log_probs(prefix)
        return softmax_over(
            tokens,
            formula([log_probs[t] for t in tokens], [scores[(*prefix, t)] for t in tokens]),
        )

    beams, _, _ = run(method, tabular, scores)
    expected = distribution(tabular, step)
    check_draws(beams, expected)
    with pytest.raises(AssertionError):
        check_draws(
            beams, distribution(tabular, lambda prefix: np.exp(tabular.step_log_probs(prefix)))
        )


def test_q_sharp_with_exact_values_draws_from_the_optimum():
    """pi_base(y) exp(eta r(y)) / Z, the solution of the regularised problem."""
    eta, tabular = 1.3, problem(2)
    method = methods.q_sharp(eta, VOCABULARY, CHAINS)
    tilted = tabular.values({answer: math.exp(eta * r) for answer, r in tabular.rewards.items()})
    beams, _, _ = run(method, tabular, {prefix: math.log(v) for prefix, v in tilted.items()})
    weights = {
        answer: math.exp(tabular.log_prob(answer) + eta * tabular.rewards[answer])
        for answer in tabular.answers()
    }
    check_draws(beams, {answer: w / sum(weights.values()) for answer, w in weights.items()})


@pytest.mark.parametrize(("goal", "alpha", "beta"), [(1.5, 0.5, 0.7), (0.3, 0.2, 0.4)])
def test_cards_accepts_as_its_threshold_says(goal, alpha, beta):
    proposals, tabular = 3, problem(3)
    scores = prefix_scores(tabular, 3)
    method = methods.cards(
        goal, HORIZON, proposals=proposals, alpha=alpha, beta=beta, max_segment=1
    )
    method = methods.dataclasses.replace(method, beam_width=CHAINS)
    start = (1 - alpha) * scores[()] + alpha * goal

    def accepts(prefix):
        threshold = min(goal, start + len(prefix) * (goal - start) / HORIZON)
        return min(1.0, math.exp((scores[prefix] - threshold) / beta))

    def step(prefix):
        chances = np.exp(tabular.step_log_probs(prefix))
        found = np.zeros(VOCABULARY)
        for proposed in itertools.product(range(VOCABULARY), repeat=proposals):
            left = math.prod(chances[token] for token in proposed)
            for token in proposed:
                found[token] += left * accepts((*prefix, token))
                left *= 1 - accepts((*prefix, token))
            found[max(proposed, key=lambda token: scores[(*prefix, token)])] += left
        return found

    beams, output, _ = run(method, tabular, scores)
    check_draws(beams, distribution(tabular, step))
    # What is remembered of the prompt is no query.
    assert output.num_queries[0] == output.trace.new.sum()


@pytest.mark.parametrize(
    ("method", "select"),
    [
        (methods.iro(2, 3, 2), oracle.distinct_first),
        (methods.reward_search(2, 3, 1), oracle.distinct_first),
        (methods.weak_to_strong(3, 2, 2), oracle.best_k),
        (methods.blockwise(4, 2), oracle.best_of_each_row),
        (methods.blockwise(3, 1, chains=2), oracle.best_of_each_row),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_searches_are_the_oracles(method, select):
    for seed in range(6):
        tabular = problem(seed)
        scores = prefix_scores(tabular, seed)
        beams, output, noise = run(method, tabular, scores, seed=seed)

        def draw(step, row, slot, prefix, i, tabular=tabular, noise=noise):
            last = prefix[-1] if prefix else VOCABULARY
            now = tabular.log_policy[len(prefix), last]
            token = int(np.argmax(now + noise[step, row * method.num_successors + slot, i]))
            return token, float(now[token]), token == EOS

        wanted = oracle.oracle_search(
            draw=draw,
            score=lambda tokens, scores=scores: np.float32(method.weight * scores[tokens]),
            width=method.beam_width,
            successors=method.num_successors,
            chunk_length=method.chunk_length,
            limit=HORIZON,
            select=select,
        )
        assert beams == [beam.tokens for beam in wanted.beams]
        assert int(output.num_tokens[0]) == wanted.num_tokens


def test_best_of_n_is_the_best_of_n_samples():
    method, tabular = methods.best_of_n(8), problem(4)
    nothing = dict.fromkeys(prefix_scores(tabular), 0.0)
    _, output, noise = run(method, tabular, nothing)
    samples = []
    for sample in range(8):
        answer = ()
        while not tabular.is_complete(answer):
            noisy = tabular.step_log_probs(answer) + noise[0, sample, len(answer)]
            answer = (*answer, int(np.argmax(noisy)))
        samples.append(answer)
    finalists = output.finalists
    found = [
        tuple(finalists.tokens[0, i, : finalists.lengths[0, i]].tolist())
        for i in np.flatnonzero(finalists.valid[0])
    ]
    assert sorted(found) == sorted(samples)
    rewards = np.asarray([tabular.rewards.get(answer, 0.0) for answer in found])
    places = np.full(finalists.valid.shape, -np.inf)
    places[0, np.flatnonzero(finalists.valid[0])] = rewards
    chosen = search.choose(output, jnp.asarray(places)).best[0]
    assert places[0, chosen] == max(tabular.rewards[answer] for answer in samples)
    assert code(found[0], VOCABULARY) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.args(weight=0), "args: a weight must be positive"),
        (lambda: methods.args(temperature=0), "temperature must be positive or None"),
        (lambda: methods.cards(1.0, 16, beta=0), "beta"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
