"""Training-time rivals on a tiny policy: exact log-probabilities, and rewards that rise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax import baselines as b
from iro_jax.baselines.policies import answer_log_probs
from iro_jax.data import Prompt
from iro_jax.models import Sampling
from iro_jax.models.lora import init_adapters, merge_into
from iro_jax.rewards import CallableReward, TextAnswer
from iro_jax.testing import tiny_pretrained, word_tokenizer
from iro_jax.values import AnswerTokens, FitSettings, ValueFunction, ValueNetwork, ValueParams

pytestmark = pytest.mark.slow

WORDS = [f"w{i}" for i in range(30)]
TOKENIZER = word_tokenizer(WORDS)
POLICY = tiny_pretrained(TOKENIZER)
TOKENS = AnswerTokens(TOKENIZER, POLICY)
PROMPTS = [Prompt(f"p{i}", f"w{i} w{(3 * i) % 30}") for i in range(24)]


def share_of_even(conversation, text):
    words = [word for word in text.split() if word.startswith("w")]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(len(words), 1)


def words(seed, number, *, even):
    rng = np.random.default_rng(seed)
    some = [word for word in WORDS if (int(word[1:]) % 2 == 0) == even]
    return " ".join(rng.choice(some, number))


def pairs(count, first=0):
    return [
        b.Pair(
            PROMPTS[i % len(PROMPTS)],
            TextAnswer(words(2 * i, 4, even=True)),
            TextAnswer(words(2 * i + 1, 4, even=False)),
        )
        for i in range(first, first + count)
    ]


def test_log_probs_are_those_of_the_softmax_and_adapters_those_of_merged_weights():
    network, params = POLICY.network, POLICY.params
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(TOKENIZER), size=(3, 9)).astype(np.int32)
    lengths = np.array([9, 4, 6])
    mask = np.arange(9) < lengths[:, None]
    found = b.token_log_probs(network, params, jnp.asarray(tokens), jnp.asarray(mask))
    logits = np.asarray(network.forward(params, tokens, mask, want=("logits",)).logits, np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    for row, length in enumerate(lengths):
        for place in range(9):
            expected = 0.0
            if 0 < place < length:
                expected = log_probs[row, place - 1, tokens[row, place]]
            assert found[row, place] == pytest.approx(expected, abs=1e-4)

    adapters = init_adapters(network.config, jax.random.key(1), copies=1, rank=2)
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)
    changed = b.token_log_probs(network, params, tokens, mask, adapters=adapters)
    merged = b.token_log_probs(network, merge_into(params, adapters), tokens, mask)
    np.testing.assert_allclose(changed, merged, atol=1e-4)
    assert np.abs(changed - found).max() > 0.01


@pytest.mark.parametrize("trainable", ["adapters", "all"])
def test_dpo_raises_the_better_answers_over_the_worse_ones(tmp_path, trainable):
    settings = b.TuningSettings(
        trainable,
        rank=4,
        fit=FitSettings(learning_rate=1e-2, batch_size=8, num_epochs=3, patience=None),
    )
    before = jax.tree.map(np.array, POLICY.params)
    held_out = pairs(64, first=1000)
    tuned = b.tune_dpo(POLICY, pairs(240), held_out, TOKENS, settings, folder=tmp_path)
    assert tuned.curve[-1].held_out_loss < 0.5 < tuned.curve[0].held_out_loss
    assert tuned.curve[0].held_out_loss == pytest.approx(np.log(2), abs=1e-4)

    def log_ratios(answers):
        readings = [TOKENS(pair.prompt, a) for pair, a in zip(held_out, answers, strict=True)]
        of_each = [answer_log_probs(p, readings, length=16).sum(1) for p in (tuned.policy, POLICY)]
        return of_each[0] - of_each[1]

    better = log_ratios([pair.chosen for pair in held_out])
    worse = log_ratios([pair.rejected for pair in held_out])
    assert np.mean(better > worse) > 0.8
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, POLICY.params))


def test_a_reward_model_from_pairs_ranks_others(tmp_path):
    model = tiny_pretrained(TOKENIZER, head="score", seed=2)
    start = ValueFunction(model, ValueNetwork(model.network), ValueParams(model.params))
    settings = FitSettings(learning_rate=1e-2, batch_size=8, num_epochs=8, patience=3)
    found = b.tune_reward(start, pairs(64), pairs(32, first=100), TOKENS, settings, folder=tmp_path)
    assert found.accuracy > 0.9
    swapped = [
        dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        for pair in pairs(32, first=100)
    ]
    untrained = FitSettings(learning_rate=1e-12, batch_size=8, num_epochs=1)
    again = b.tune_reward(
        found.function, swapped, swapped, TOKENS, untrained, folder=tmp_path / "again"
    )
    assert again.accuracy == pytest.approx(1 - found.accuracy)


ONLINE = b.OnlineSettings(
    rounds=6,
    prompts_per_round=8,
    answers=8,
    max_new_tokens=4,
    sampling=Sampling(top_k=30),
)
TUNING = b.TuningSettings(
    rank=4, fit=FitSettings(learning_rate=2e-2, batch_size=28, num_epochs=2, patience=None)
)


def test_grpo_raises_the_reward_of_its_own_answers(tmp_path):
    found = b.tune_grpo(
        POLICY, PROMPTS, CallableReward(share_of_even), TOKENS, ONLINE, TUNING, folder=tmp_path
    )
    rewards = [one.mean_reward for one in found.rounds]
    assert len(rewards) == 6
    assert rewards[-1] > rewards[0] + 0.2


def test_irepo_raises_the_rewards_of_its_annotators(tmp_path):
    annotators = [
        CallableReward(share_of_even),
        CallableReward(lambda prompt, text: 2 * share_of_even(prompt, text)),
        CallableReward(lambda prompt, text: 0.0),
    ]
    settings = dataclasses.replace(TUNING, fit=dataclasses.replace(TUNING.fit, batch_size=14))
    found = b.tune_irepo(
        POLICY, PROMPTS, annotators, TOKENS, ONLINE, settings, beta=0.3, folder=tmp_path
    )
    rewards = [one.mean_reward for one in found.rounds]
    assert rewards[-1] > rewards[0] + 0.1


def test_a_killed_run_finds_its_rounds_again(tmp_path):
    few = dataclasses.replace(ONLINE, rounds=2)
    reward = CallableReward(share_of_even)
    whole = b.tune_grpo(POLICY, PROMPTS, reward, TOKENS, few, TUNING, folder=tmp_path / "a")
    one = dataclasses.replace(few, rounds=1)
    b.tune_grpo(POLICY, PROMPTS, reward, TOKENS, one, TUNING, folder=tmp_path / "b")
    rest = b.tune_grpo(POLICY, PROMPTS, reward, TOKENS, few, TUNING, folder=tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, whole.policy.params, rest.policy.params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b.OnlineSettings(answers=3), "Got: 8, 16, 3"),
        (lambda: b.TuningSettings("head"), "'adapters' or 'all'"),
        (lambda: b.tune_dpo(POLICY, [], [], TOKENS, TUNING, folder=None), "Got: 0 and 0"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
