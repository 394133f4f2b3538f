"""Plain sampling: answers depend on the prompt alone, and programs on the bucket alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.models import (
    CheckpointError,
    Pretrained,
    Sampler,
    Sampling,
    TextFormat,
    bucket_length,
    generate,
    pad_prompts,
    prompt_keys,
)
from iro_jax.models.weights.load import check_tokenizer
from iro_jax.testing import tiny_network, word_tokenizer
from tests.models.test_sampling import exact

WORDS = [f"w{i}" for i in range(55)]
EOS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    network = tiny_network()
    params = jax.tree.map(lambda x: 8 * x, network.init(jax.random.key(0)))
    return Pretrained(
        network=network,
        params=params,
        tokenizer=word_tokenizer(WORDS),
        eos_ids=(EOS,),
        hf_config={},
        origin=tmp_path_factory.getbasetemp(),
    )


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=length)) for length in lengths]


def test_32_prompts_compile_once_a_bucket(model):
    lengths = np.random.default_rng(0).permutation(np.linspace(1, 100, 32).astype(int))
    sampler = Sampler(model, max_new_tokens=8, batch_size=4)
    answers = sampler(prompts_of(lengths))
    buckets = {bucket_length(int(n)) for n in lengths}
    assert len(answers) == 32
    assert len(buckets) == 3
    assert sampler._generate._cache_size() == len(buckets)
    sampler(prompts_of(lengths[::-1], seed=1), seed=5)
    assert sampler._generate._cache_size() == len(buckets)


def test_the_trace_count_agrees(model):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sample(params, keys, tokens, mask):
        return generate(
            model.network,
            params,
            keys,
            tokens,
            mask,
            sampling=Sampling(),
            eos_ids=(EOS,),
            max_new_tokens=4,
        )

    for seed in range(3):
        batch = pad_prompts([np.array([9, 10 + seed]), np.array([11] * (seed + 1))])
        sample(model.params, prompt_keys(seed, ["a", "b"]), batch.tokens, batch.mask)


def test_an_answer_does_not_depend_on_its_neighbours(model):
    prompts = prompts_of([5, 40, 3, 17, 60, 9])
    names = [f"prompt {i}" for i in range(6)]
    together = Sampler(model, max_new_tokens=24, batch_size=4)(
        prompts, prompt_ids=names, num_samples=3
    )
    for index in (0, 3, 4):
        [alone] = Sampler(model, max_new_tokens=24, batch_size=1)(
            [prompts[index]], prompt_ids=[names[index]], num_samples=3
        )
        assert [a.tokens for a in alone] == [a.tokens for a in together[index]]
    [one] = Sampler(model, max_new_tokens=24, batch_size=1)([prompts[1]], prompt_ids=[names[1]])
    assert one[0].tokens == together[1][0].tokens
    other_seed = Sampler(model, max_new_tokens=24)(prompts, prompt_ids=names, seed=1)
    assert other_seed[0][0].tokens != together[0][0].tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_log_probs_are_those_of_reading_the_answer(model, side):
    prompt = np.array([10, 11, 12, 13, 14], np.int32)
    tokens = np.full((2, 9), 63, np.int32)
    mask = np.zeros((2, 9), bool)
    span = slice(0, 5) if side == "right" else slice(4, 9)
    tokens[:, span], mask[:, span] = prompt, True
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9)
    answers = jax.jit(
        functools.partial(
            generate,
            model.network,
            sampling=sampling,
            eos_ids=(EOS, 40),
            max_new_tokens=30,
            num_samples=16,
        )
    )(model.params, prompt_keys(0, ["a", "b"]), tokens, mask)
    assert answers.finished.any()
    assert not answers.finished.all()
    for row in range(2):
        for sample in range(16):
            length = int(answers.lengths[row, sample])
            drawn = np.asarray(answers.tokens[row, sample])
            ended = bool(answers.finished[row, sample])
            assert ended == (drawn[length - 1] in (EOS, 40))
            assert not np.isin(drawn[: length - 1], (EOS, 40)).any()
            assert (drawn[length:] == 0).all()
            assert length == 30 or ended
            read = np.concatenate([prompt, drawn[:length]])[None]
            logits = model.network.forward(model.params, read, np.ones(read.shape, bool)).logits
            policy = np.asarray(jax.nn.log_softmax(logits[0, 4:-1]))
            got = np.asarray(answers.log_probs[row, sample])
            np.testing.assert_allclose(
                got[:length], policy[np.arange(length), drawn[:length]], atol=1e-4
            )
            assert (got[length:] == 0).all()
            warped = [
                np.log(exact(of_token, sampling)[token])
                for of_token, token in zip(logits[0, 4:-1], drawn[:length], strict=True)
            ]
            got = answers.warped_log_probs[row, sample, :length]
            np.testing.assert_allclose(got, warped, atol=1e-3)


def test_completions_are_text(model):
    [[answer]] = Sampler(model, max_new_tokens=12)([[{"role": "user", "content": "w1 w2"}]])
    assert set(answer.text.split()) <= set(WORDS) | {"user", "assistant", "system"}
    assert answer.log_prob < 0
    assert len(answer.tokens) <= 12


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["w1", ""], "Prompt 1: The prompt is empty"),
        (["w1 " * 125], r"Prompt 0: The prompt is longer than the 120 tokens.*Got: 125"),
        ([[{"role": "user"}]], "Prompt 0: Message 0 must have"),
    ],
)
def test_bad_prompts_stop_before_any_sampling(model, prompts, message, monkeypatch):
    sampler = Sampler(model, max_new_tokens=8)
    monkeypatch.setattr(sampler, "_generate", None)
    with pytest.raises(ValueError, match=message):
        sampler(prompts)


def test_long_prompts_can_be_cut(model):
    sampler = Sampler(model, max_new_tokens=8, text_format=TextFormat(truncation="left"))
    assert len(sampler(["w1 " * 500])[0][0].tokens) > 0


def test_a_reward_model_cannot_answer(model):
    import dataclasses

    with pytest.raises(ValueError, match="a reward model cannot answer"):
        Sampler(dataclasses.replace(model, network=tiny_network(head="score")))


def test_one_text_is_not_a_list_of_prompts(model):
    with pytest.raises(ValueError, match="Expected a list of prompts"):
        Sampler(model, max_new_tokens=8)("w1 w2")


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 128}, {"max_new_tokens": 0}, {"batch_size": 0}]
)
def test_bad_samplers(model, options):
    with pytest.raises(ValueError, match="Got: "):
        Sampler(model, **options)


def test_ids_without_embeddings(model):
    import dataclasses

    big = word_tokenizer([f"x{i}" for i in range(300)])
    with pytest.raises(CheckpointError, match=r"does not fit.*vocab_size=64"):
        check_tokenizer(big, 64, "here")
    sampler = Sampler(dataclasses.replace(model, tokenizer=big), max_new_tokens=8)
    with pytest.raises(
        ValueError, match=r"Prompt 0: .*below vocab_size=64 and not negative. Got: "
    ):
        sampler(["x1 x250"])


def test_network_functions_check_their_inputs(model):
    network, params = model.network, model.params
    tokens, mask = jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), bool)
    with pytest.raises(AssertionError):
        network.forward(params, tokens[0], mask[0])
    with pytest.raises(AssertionError):
        network.forward(params, tokens.astype(jnp.float32), mask)
    with pytest.raises(AssertionError):
        network.forward(params, tokens, tokens)
    cache = network.empty_cache(num_prompts=2, prompt_slots=5)
    with pytest.raises(AssertionError):
        network.prefill(params, cache, tokens, mask)
    with pytest.raises(AssertionError):
        network.decode(params, cache, jnp.ones((2, 1, 3, 1), jnp.int32))
    with pytest.raises(ValueError, match=r"The chunk has 1 slots. Got: 2 tokens"):
        network.decode(params, cache, jnp.ones((2, 1, 1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"beam_slots must be at least chunk_length. Got: 0 and 1"):
        cache.commit(jnp.zeros((2, 1), jnp.int32))
    with pytest.raises(ValueError, match=r"want must be some of .* Got: \('logit',\)"):
        network.forward(params, tokens, mask, want=("logit",))
    scorer = tiny_network(head="score")
    with pytest.raises(ValueError, match="no language-model head"):
        scorer.forward(scorer.init(jax.random.key(0)), tokens, mask, want=("logits",))
    with pytest.raises(ValueError, match="at least 1"):
        generate(
            network,
            params,
            prompt_keys(0, ["a", "b"]),
            tokens,
            mask,
            sampling=Sampling(),
            eos_ids=(),
            max_new_tokens=0,
        )
