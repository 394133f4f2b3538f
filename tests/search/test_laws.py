"""What the search promises about probabilities: equation (13) and the two sampling targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta

from iro_jax import search as s
from tests.conftest import OPTIMISED
from tests.search.tabular import Tabular, bare_root, keys, sampled_successors, table_scores

optimised = functools.partial(jax.jit, compiler_options=OPTIMISED)


def uniform_successors(vocabulary, chunk_length):
    """`expand_fn` of the uniform policy: i.i.d. chunks."""

    def expand_fn(params, prompt_keys, frontier):
        shape = (*frontier.open.shape[1:], chunk_length)

        def draw(key, step):
            key = jax.random.fold_in(key, step)
            return jax.random.randint(key, shape, 0, vocabulary)

        tokens = jax.vmap(draw)(prompt_keys, frontier.step)
        lengths = jnp.minimum(chunk_length, frontier.room[..., None])
        lengths = jnp.broadcast_to(lengths, frontier.open.shape)
        ended = jnp.zeros(lengths.shape, bool)
        return s.Chunk(tokens, lengths, ended, jnp.zeros(tokens.shape)), None

    return expand_fn


def optimal_values(params, candidates, memory):
    """V* where one answer, all zeros, is worth 1: whether it can still be reached."""
    tokens = s.sequences(candidates)
    possible = jnp.all(tokens == 0, axis=-1).reshape(candidates.new.shape)
    scores = possible.astype(jnp.float32)
    return s.Scores(scores, scores[..., None]), memory


def successes(
    vocabulary,
    horizon,
    chunk_length,
    width,
    successors,
    runs,
    seed=5000,
    select_fn=s.diversity_first,
):
    @optimised
    def run(prompt_keys):
        output = s.search(
            None,
            prompt_keys,
            bare_root(prompt_keys.shape[0]),
            expand_fn=uniform_successors(vocabulary, chunk_length),
            score_fn=optimal_values,
            select_fn=select_fn,
            beam_width=width,
            num_successors=successors,
            chunk_length=chunk_length,
            max_new_tokens=horizon,
        )
        return jnp.sum(jnp.max(output.finalists.scores.total, axis=-1) == 1.0)

    batch = 20_000
    batches = -(-runs // batch)
    return sum(int(run(keys(batch, seed + i))) for i in range(batches)), batches * batch


def interval(hits, runs):
    """Clopper and Pearson's 95% interval."""
    return beta.ppf(0.025, hits, runs - hits + 1), beta.ppf(0.975, hits + 1, runs - hits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "horizon", "chunk_length", "candidates"),
    [(64, 2, 1, 4), (64, 2, 1, 16), (64, 3, 1, 16), (100, 2, 1, 9), (8, 4, 2, 16)],
)
def test_success_probabilities_follow_proposition_1(vocabulary, horizon, chunk_length, candidates):
    """K = 1, B = U against best-of-U at the same number of tokens.

    A chunk of L uniform tokens is one of |A|^L actions, so the last case is a vocabulary of
    64 as well. The paper's U / |A|^L is the first order of the exact 1 - (1 - |A|^-L)^U,
    which is what is compared.
    """
    actions = vocabulary**chunk_length
    guided = (1 - (1 - 1 / actions) ** candidates) ** (horizon // chunk_length)
    hits, runs = successes(vocabulary, horizon, chunk_length, 1, candidates, int(600 / guided))
    assert hits >= 500
    low, high = interval(hits, runs)
    assert low <= guided <= high

    blind = 1 - (1 - vocabulary**-horizon) ** candidates
    if blind * 600_000 >= 100:
        hits, runs = successes(vocabulary, horizon, horizon, 1, candidates, int(200 / blind))
        low, high = interval(hits, runs)
        assert low <= blind <= high


@pytest.mark.slow
@pytest.mark.parametrize(
    ("horizon", "width", "top_k_helps"), [(2, 2, False), (2, 4, False), (3, 4, False), (3, 4, True)]
)
def test_proposition_1_does_not_hold_for_several_beams(horizon, width, top_k_helps):
    """With K = B = sqrt(U) a beam that is on the way gets only B successors, not U.

    All U candidates of the first chunk have the same parent, later only B: the other beams are
    wasted on prefixes that are lost. Keeping duplicates instead (`top_k`) gives the right prefix
    several beams now and then, which helps a little, and nothing in the formula says so.
    """
    first, later = (1 - (1 - 1 / 64) ** n for n in (width**2, width))
    formula, expected = first**horizon, first * later ** (horizon - 1)
    select_fn = s.top_k if top_k_helps else s.diversity_first
    hits, runs = successes(64, horizon, 1, width, width, int(500 / expected), 9000, select_fn)
    assert hits >= 400
    low, high = interval(hits, runs)
    assert high < formula / 1.5
    if top_k_helps:
        assert low > expected
    else:
        assert low <= expected <= high


def particles(problem, values, number, successors, select_fn, seed):
    """The final beams of one search of `number` beams, as a distribution over answers."""
    vocabulary, horizon = problem.vocabulary, problem.horizon
    run = _particle_search(vocabulary, horizon, number, successors, select_fn)
    table = problem.code_table(values)
    params = {
        "log_policy": problem.log_policy[None],
        "totals": table[None],
        "parts": table[None, :, None],
    }
    beams = jax.device_get(run(params, keys(1, seed)))
    counts = {}
    for tokens, length in zip(beams.tokens[0], beams.lengths[0], strict=True):
        answer = tuple(tokens[:length].tolist())
        counts[answer] = counts.get(answer, 0) + 1 / number
    return counts


@functools.cache
def _particle_search(vocabulary, horizon, number, successors, select_fn):
    @optimised
    def run(params, prompt_keys):
        shape = (1, horizon, number * successors, 1, vocabulary)
        noise = jax.random.gumbel(jax.random.fold_in(prompt_keys[0], 7), shape)
        return s.search(
            params | {"noise": noise},
            prompt_keys,
            bare_root(1),
            expand_fn=sampled_successors(1, True),
            score_fn=table_scores(vocabulary),
            select_fn=select_fn,
            beam_width=number,
            num_successors=successors,
            chunk_length=1,
            max_new_tokens=horizon,
        ).beams

    return run


def total_variation(p, q):
    return sum(abs(p.get(answer, 0.0) - q.get(answer, 0.0)) for answer in p.keys() | q.keys()) / 2


def globally_tilted(problem, values):
    """pi_base(y) exp(V(y)), normalised once."""
    weights = {y: np.exp(problem.log_prob(y) + values[y]) for y in problem.answers()}
    total = sum(weights.values())
    return {y: w / total for y, w in weights.items()}


def state_tilted(problem, values):
    """pi_t of equation (6): pi_base(a|s) exp(V([s, a])), normalised in every state."""

    def probability(answer):
        result = 1.0
        for i, token in enumerate(answer):
            prefix = answer[:i]
            weights = np.exp(
                problem.step_log_probs(prefix)
                + [values[(*prefix, t)] for t in range(problem.vocabulary)]
            )
            result *= weights[token] / weights.sum()
        return result

    return {y: probability(y) for y in problem.answers()}


NUMBERS = (16, 64, 256, 1024, 4096)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("select_fn", "successors", "target", "other"),
    [
        (s.resample, 1, globally_tilted, state_tilted),
        (s.resample, 3, globally_tilted, state_tilted),
        (s.softmax_per_parent, 256, state_tilted, globally_tilted),
    ],
    ids=["resample-B1", "resample-B3", "softmax_per_parent"],
)
def test_particles_approach_their_target(select_fn, successors, target, other):
    problem = Tabular.random(5, 3, 4, levels=7)
    values = {prefix: 1.5 * value for prefix, value in problem.values().items()}
    wanted, unwanted = target(problem, values), other(problem, values)
    assert abs(sum(wanted.values()) - 1) < 1e-6
    apart = total_variation(wanted, unwanted)
    assert apart > 0.1

    distances = []
    for number in NUMBERS:
        runs = [
            particles(problem, values, number, successors, select_fn, seed)
            for seed in range(12 if number < 1024 else 4)
        ]
        distances.append(np.mean([total_variation(run, wanted) for run in runs]))
        last = runs[0]
    slope = np.polyfit(np.log(NUMBERS), np.log(distances), 1)[0]
    assert -0.6 < slope < -0.4, distances
    # The two targets are told apart.
    assert total_variation(last, unwanted) > apart - 2 * distances[-1]
    assert distances[-1] < apart / 3


def test_one_round_of_stochastic_selection_is_a_softmax():
    """K = 1 draws one candidate in proportion to exp(score / temperature)."""
    prompts, candidates = 20_000, 4
    scores = jnp.array([0.0, 1.0, 2.0, -jnp.inf])
    shape = (prompts, 1, candidates)
    valid = jnp.broadcast_to(jnp.array([True, True, True, False]), shape)

    class Some:
        pass

    some = Some()
    some.valid = valid
    chosen = s.stochastic(
        keys(prompts), jnp.broadcast_to(scores, (prompts, candidates)), some, temperature=2.0
    )
    weights = np.exp(np.array([0.0, 0.5, 1.0]))
    shares = np.bincount(np.asarray(chosen)[:, 0], minlength=4)[:3] / prompts
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.015)
