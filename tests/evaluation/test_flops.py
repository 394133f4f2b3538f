"""FLOPs against XLA's own count, against loops over single tokens, and against Table 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.evaluation import (
    Cost,
    Ledger,
    Reader,
    decode_flops,
    forward_flops,
    reward_cost,
    sample_cost,
    search_cost,
    trace_cost,
)
from iro_jax.models import Network
from iro_jax.models.lora import init_adapters
from iro_jax.search import Chunk, Root, Scores, search
from iro_jax.testing import tiny_config

pytestmark = pytest.mark.usefixtures("xla_alone")

# Wide enough that what is not a matrix product is a few percent.
WIDE = tiny_config(embed_dim=128, mlp_dim=256, num_heads=4, head_dim=32, vocab_size=512)
SMALL = tiny_config()


def flops_of_xla(function, *arguments):
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "score"},
        {"gated_mlp": False, "num_kv_heads": 4, "activation": "gelu"},
        {"tied_embeddings": True, "layers": WIDE.layers[:1] * 3},
    ],
)
def test_reading_costs_what_xla_counts(changes):
    config = WIDE.replace(**changes)
    network = Network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = jnp.zeros((3, 96), jnp.int32), jnp.ones((3, 96), bool)
    counted = flops_of_xla(network.forward, params, tokens, mask)
    assert forward_flops(config, [96] * 3) == pytest.approx(counted, rel=0.1)


def test_the_first_layers_cost_what_xla_counts():
    network = Network(WIDE)
    params = jax.eval_shape(network.init, jax.random.key(0))
    short, params = network.truncate(params, 1)
    tokens, mask = jnp.zeros((1, 96), jnp.int32), jnp.ones((1, 96), bool)
    read = functools.partial(short.forward, want=(1,))
    counted = flops_of_xla(read, params, tokens, mask)
    assert forward_flops(WIDE, 96, layers=1) == pytest.approx(counted, rel=0.1)
    assert forward_flops(WIDE, 96, layers=0) == 0


def test_adapters_cost_what_xla_counts():
    config = WIDE.replace(head="score")
    network = Network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    adapters = init_adapters(config, jax.random.key(1), copies=1, rank=48)
    tokens, mask = jnp.zeros((1, 96), jnp.int32), jnp.ones((1, 96), bool)

    def read(adapters, *arguments):
        return network.forward(*arguments, adapters=adapters)

    counted = flops_of_xla(read, adapters, params, tokens, mask)
    assert forward_flops(config, 96, lora_rank=48) == pytest.approx(counted, rel=0.1)
    assert counted > 1.3 * forward_flops(config, 96)


def test_a_decode_step_costs_what_xla_counts():
    network = Network(WIDE)
    params = jax.eval_shape(network.init, jax.random.key(0))
    cache = network.empty_cache(
        num_prompts=2,
        beam_width=2,
        num_successors=3,
        prompt_slots=96,
        beam_slots=64,
        chunk_length=32,
    )
    counted = flops_of_xla(network.decode, params, cache, jnp.zeros((2, 2, 3, 1), jnp.int32))
    # The program attends to every slot, those that are still empty included.
    assert 12 * decode_flops(WIDE, 1, 96 + 64 + 32 - 1) == pytest.approx(counted, rel=0.1)


def test_sampling_is_reading_token_by_token():
    one_by_one = sum(forward_flops(SMALL, 1, 5 + h) for h in range(20))
    assert decode_flops(SMALL, 20, 5) == pytest.approx(one_by_one)
    assert decode_flops(SMALL, [20, 3], [5, 2]) == pytest.approx(
        one_by_one + sum(forward_flops(SMALL, 1, 2 + h) for h in range(3))
    )


def test_chunks_add_up_to_the_whole():
    chunks = sum(decode_flops(SMALL, 4, 7 + start) for start in range(0, 20, 4))
    assert decode_flops(SMALL, 20, 7) == pytest.approx(chunks)
    # Reading at once computes the scores that a causal mask hides, too.
    pieces = sum(forward_flops(SMALL, 4, start) for start in range(0, 20, 4))
    assert decode_flops(SMALL, 20) < pieces < forward_flops(SMALL, 20)


def test_texts_are_summed_whichever_argument_has_several():
    each = [forward_flops(SMALL, 3, context) for context in (0, 5, 9)]
    assert forward_flops(SMALL, 3, [0, 5, 9]) == pytest.approx(sum(each))
    reader = Reader(SMALL.replace(head="score"), num_values=3)
    each = [reader.flops(3, context) for context in (0, 5, 9)]
    assert reader.flops(3, [0, 5, 9]) == pytest.approx(sum(each))


def test_more_layers_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"layers must be from 0 to 2. Got: 3"):
        forward_flops(SMALL, 4, layers=3)


VALUE = Reader(tiny_config(head="score", embed_dim=24, mlp_dim=40))


def cost(num_values=1, *, S=5, U=16, H=32, L=8, **changes):
    return search_cost(
        SMALL,
        [VALUE] * num_values,
        prompt_tokens=S,
        beam_width=4,
        num_successors=U // 4,
        chunk_length=L,
        max_new_tokens=H,
        **changes,
    )


def exponent(xs, ys):
    """The power of x that y grows with."""
    return np.polyfit(np.log(xs), np.log(ys), 1)


def polynomial(xs, ys, degree):
    """Its coefficients, highest first, after a check that it is one."""
    coefficients = np.polyfit(np.asarray(xs, float), np.asarray(ys, float), degree)
    np.testing.assert_allclose(np.polyval(coefficients, xs), ys, rtol=1e-9)
    return coefficients


def test_tokens_and_queries_follow_table_1():
    for H, U, L, count in ((32, 16, 8, 1), (48, 8, 16, 3), (50, 12, 16, 2)):
        found = cost(count, H=H, U=U, L=L)
        assert found.tokens_sampled == U * H
        assert found.value_queries == U * -(-H // L) * count
        assert found.reward_queries == found.reward_flops == 0
    for sweep, power in (("H", 1), ("U", 1), ("L", -1)):
        sizes = np.array([8, 16, 32, 64])
        queries = [cost(**({"H": 64} | {sweep: int(size)})).value_queries for size in sizes]
        assert exponent(sizes, queries)[0] == pytest.approx(power)


def test_policy_flops_are_quadratic_in_the_length_through_attention_alone():
    lengths = np.arange(8, 8 * 40, 8)
    quadratic, linear, constant = polynomial(
        lengths, [cost(H=int(H)).policy_flops for H in lengths], 2
    )
    layers, width = SMALL.num_layers, SMALL.num_heads * SMALL.head_dim
    # Half of H^2 pairs, a score and a weighted sum each, for each of U = 16 candidates.
    assert quadratic == pytest.approx(16 * layers * 4 * width / 2)
    projections = forward_flops(SMALL, 1) - layers * 4 * width
    assert linear == pytest.approx(16 * (projections + layers * 4 * width * (5 + 0.5)))
    assert constant == pytest.approx(forward_flops(SMALL, 5, outputs=1))
    # Table 1 gives the highest power: short answers grow with H, long ones with H^2.
    short, long = np.array([8, 16]), np.array([2**17, 2**18])
    slopes = [exponent(x, [cost(H=int(H), S=0).policy_flops for H in x])[0] for x in (short, long)]
    assert slopes[0] < 1.2
    assert slopes[1] > 1.9


def test_value_flops_are_linear_in_values_and_candidates_and_quadratic_in_length():
    one = cost(1).value_flops
    assert [cost(count).value_flops for count in (2, 4, 8)] == pytest.approx(
        [2 * one, 4 * one, 8 * one]
    )
    candidates = np.array([4, 8, 16, 32])
    slope, constant = polynomial(candidates, [cost(U=int(U)).value_flops for U in candidates], 1)
    assert constant == pytest.approx(VALUE.flops(5))
    lengths = np.arange(8, 8 * 40, 8)
    quadratic, _, _ = polynomial(lengths, [cost(H=int(H)).value_flops for H in lengths], 2)
    width = VALUE.config.num_heads * VALUE.config.head_dim
    assert quadratic == pytest.approx(16 * VALUE.config.num_layers * 4 * width / 2)
    assert slope * 16 == pytest.approx(one - constant)


def test_rereading_prefixes_makes_the_projections_quadratic_as_in_table_1():
    lengths = np.arange(8, 8 * 40, 8)
    cubic, quadratic, *_ = polynomial(
        lengths, [cost(H=int(H), reread=True).value_flops for H in lengths], 3
    )
    width = VALUE.config.num_heads * VALUE.config.head_dim
    attention = VALUE.config.num_layers * 4 * width
    projections = VALUE.flops(1) - attention
    # Each of H / L chunks reads S + k L tokens again: H^2 / 2 L of them, squared H^3 / 3 L pairs.
    assert cubic == pytest.approx(16 * attention / (3 * 8))
    expected = 16 * (projections / (2 * 8) + attention * (2 * 5 / (2 * 8) + 1 / 2))
    assert quadratic == pytest.approx(expected)
    assert cost(H=64, reread=True).value_flops > 3 * cost(H=64).value_flops


def test_the_policys_latency_and_work_do_not_depend_on_the_chunk_length():
    assert cost(L=4).policy_flops == pytest.approx(cost(L=16).policy_flops)
    assert cost(L=4).tokens_sampled == cost(L=16).tokens_sampled


def test_best_of_n_costs_n_samples_and_n_rewards():
    reward = Reader(SMALL.replace(head="score"))
    lengths = np.full((1, 16), 32)
    found = sample_cost(SMALL, prompt_tokens=[5], lengths=lengths)
    found += reward_cost(reward, lengths[0] + 5)
    guided = cost(0)
    assert found.policy_flops == pytest.approx(guided.policy_flops)
    assert found.tokens_sampled == guided.tokens_sampled
    assert found.reward_queries == 16
    assert found.reward_flops == pytest.approx(16 * forward_flops(reward.config, 37))
    assert found.tokens_read == 5 + 16 * 37
    assert sample_cost(SMALL, prompt_tokens=5, lengths=lengths[0]).policy_flops == pytest.approx(
        guided.policy_flops
    )


def test_heads_on_the_policys_features_cost_next_to_nothing_but_are_queries():
    heads = Reader(SMALL, layers=0, num_values=3)
    backbone = Reader(SMALL, layers=1, num_values=3)
    sizes = {"prompt_tokens": 5, "beam_width": 4, "num_successors": 4}
    sizes |= {"chunk_length": 8, "max_new_tokens": 32}
    free = search_cost(SMALL, [heads], **sizes)
    shared = search_cost(SMALL, [backbone], **sizes)
    assert free.value_queries == shared.value_queries == 16 * 4 * 3
    assert free.value_flops == 3 * 2 * SMALL.embed_dim * (5 + 16 * 32)
    assert free.value_flops < 0.05 * shared.value_flops
    assert (free.tokens_read, shared.tokens_read) == (5, 5 + 5 + 16 * 32)


# A search with nothing but lengths: answers end at random in the middle of chunks.
P, K, B, L, H, T = 3, 2, 3, 4, 14, 2
PROMPTS = np.array([5, 1, 9])


@pytest.fixture(scope="module")
def run_search():
    """The search as a function of whether answers end early."""

    def expand_fn(params, keys, frontier):
        shape = frontier.open.shape
        keys = jax.vmap(jax.random.fold_in)(keys, frontier.step)
        draws = jax.vmap(lambda key: jax.random.randint(key, shape[1:], 1, L + 1))(keys)
        full = jnp.minimum(L, frontier.room[..., None])
        lengths = jnp.where(params, jnp.minimum(draws, full), full)
        tokens = jnp.broadcast_to(draws[..., None], (*shape, L)).astype(jnp.int32)
        return Chunk(tokens, lengths, lengths < full, jnp.zeros((*shape, L))), None

    def score_fn(params, candidates, memory):
        totals = jnp.sin(37.0 * candidates.nodes)
        return Scores(totals, jnp.stack([totals] * T, -1)), memory

    root = Root(None, None, Scores(jnp.zeros(P), jnp.zeros((P, T))))
    compiled = jax.jit(
        functools.partial(
            search,
            expand_fn=expand_fn,
            score_fn=score_fn,
            beam_width=K,
            num_successors=B,
            chunk_length=L,
            max_new_tokens=H,
        )
    )
    return lambda ends: compiled(ends, jax.random.split(jax.random.key(0), P), root)


@pytest.mark.parametrize("ends", [False, True])
def test_a_searchs_trace_is_billed_as_its_tokens_one_by_one(run_search, ends, tmp_path):
    output = run_search(ends)
    trace = jax.tree.map(np.asarray, output.trace)
    found = trace_cost(
        SMALL,
        [VALUE] * T,
        prompt_tokens=PROMPTS,
        chunk_lengths=trace.chunk_lengths,
        chunk_length=L,
    )
    assert found.tokens_sampled == output.num_tokens.sum()
    assert found.value_queries == output.num_queries.sum()

    policy = sum(forward_flops(SMALL, S, outputs=1) for S in PROMPTS)
    values = T * sum(VALUE.flops(S) for S in PROMPTS)
    for step, prompt, beam, successor in np.ndindex(trace.chunk_lengths.shape):
        new = trace.chunk_lengths[step, prompt, beam, successor]
        start, row, at = PROMPTS[prompt], beam, step
        while new and at > 0:  # up the tree
            parent = trace.parents[at, prompt, row]
            at, slot = divmod(int(parent), K * B)
            row = slot // B
            start += trace.chunk_lengths[at, prompt, row, slot % B]
        policy += sum(forward_flops(SMALL, 1, start + i) for i in range(new))
        values += T * VALUE.flops(new, start) if new else 0
    assert found.policy_flops == pytest.approx(policy)
    assert found.value_flops == pytest.approx(values)

    most = Cost()
    for S in PROMPTS.tolist():
        most += search_cost(
            SMALL,
            [VALUE] * T,
            prompt_tokens=S,
            beam_width=K,
            num_successors=B,
            chunk_length=L,
            max_new_tokens=H,
        )
    if ends:
        assert found.policy_flops < most.policy_flops
        assert found.value_queries < most.value_queries
    else:
        assert found == most

    ledger = Ledger(tmp_path / "cost.jsonl")
    with ledger.measure("answers", 0, "inference") as bill:
        bill += found
    total = ledger.totals("inference")
    assert (total.policy_flops, total.value_queries) == (found.policy_flops, found.value_queries)
