"""Reward models read what was answered, and score it at its last token."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from iro_jax.data import Prompt
from iro_jax.models import Pretrained, TextFormat, from_pretrained, render
from iro_jax.rewards import ModelReward, ProcessReward, TextAnswer, TokenScores
from iro_jax.testing import tiny_network, word_tokenizer

WORDS = [f"w{i}" for i in range(40)]
TOKENIZER = word_tokenizer([*WORDS, "<step>"])
CHAT = [{"role": "user", "content": "w1 w2"}]


def make_model(tokenizer=TOKENIZER, head="score") -> Pretrained:
    network = tiny_network(head=head)
    params = jax.tree.map(lambda x: 3 * x, network.init(jax.random.key(0)))
    return Pretrained(network, params, tokenizer, (2,), {}, Path("tiny"))


MODEL = make_model()


FORWARD = jax.jit(MODEL.network.forward)


def score_at_end(tokens) -> float:
    """The score of one sequence alone, padded on the other side to another length."""
    row = np.zeros((1, 100), np.int32)
    row[0, 100 - len(tokens) :] = tokens
    return float(FORWARD(MODEL.params, row, np.arange(100)[None] >= 100 - len(tokens)).score[0, -1])


def texts(count, longest=60, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_the_score_at_the_end_of_the_answer():
    answers = [TextAnswer(text) for text in texts(7)]
    prompts = [Prompt("p", "w3 w4" if i % 2 else CHAT) for i in range(7)]
    rewards = ModelReward.of(MODEL, batch_size=4)(prompts, answers)
    turn, start = [4, 6], [4, 7]  # <turn> user, <turn> assistant
    want = [
        score_at_end([*ids("w3 w4"), *ids(answer.text), 2])
        if isinstance(prompt.conversation, str)
        else score_at_end([*turn, *ids("w1 w2"), 5, *start, *ids(answer.text), 5])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert np.std(want) > 0.1
    np.testing.assert_allclose(rewards, want, atol=1e-5)


def test_an_answer_cut_short_has_no_end():
    [cut] = ModelReward.of(MODEL)([Prompt("p", "w3")], [TextAnswer("w1 w2", finished=False)])
    assert cut == pytest.approx(score_at_end(ids("w3 w1 w2")), abs=1e-5)
    [whole] = ModelReward.of(MODEL)([Prompt("p", "w3")], [TextAnswer("w1 w2")])
    assert whole == pytest.approx(score_at_end([*ids("w3 w1 w2"), 2]), abs=1e-5)
    assert abs(whole - cut) > 1e-3


def test_a_reward_does_not_depend_on_its_neighbours():
    reward = ModelReward.of(MODEL, batch_size=4)
    answers = [TextAnswer(text) for text in texts(13, longest=90)]
    prompts = [Prompt(str(i), "w5") for i in range(13)]
    together = reward(prompts, answers)
    order = np.random.default_rng(1).permutation(13)
    shuffled = reward([prompts[i] for i in order], [answers[i] for i in order])
    alone = [reward([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(shuffled, together[order], atol=1e-6)
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_sampled_tokens_are_read_if_the_vocabulary_is_the_policys():
    prompt = Prompt("p", "w3")
    # Tokens that the text, tokenised again, would not give; the EOS is another one too.
    answer = TextAnswer("w1 w2", tokens=(*ids("w9"), 5))
    same = word_tokenizer([*WORDS, "<step>"])
    other = word_tokenizer([*reversed(WORDS), "<step>"])
    as_sampled = score_at_end([*ids("w3 w9"), 5])
    as_text = score_at_end([*ids("w3 w1 w2"), 2])
    assert abs(as_sampled - as_text) > 1e-3
    for policy, want in [(same, as_sampled), (other, as_text), (None, as_text)]:
        [got] = ModelReward.of(MODEL, policy_tokenizer=policy)([prompt], [answer])
        assert got == pytest.approx(want, abs=1e-5)
    [unsampled] = ModelReward.of(MODEL, policy_tokenizer=same)([prompt], [TextAnswer("w1 w2")])
    assert unsampled == pytest.approx(as_text, abs=1e-5)


def test_any_network_with_a_score_at_every_token():
    def score_fn(params, tokens, mask):
        return jnp.cumsum(jnp.where(mask, tokens, 1000) * params, axis=1)

    reward = ModelReward(score_fn, jnp.float32(0.01), TOKENIZER, transform="sigmoid")
    [got] = reward([Prompt("p", "w3")], [TextAnswer("w1 w2")])
    want = 1 / (1 + np.exp(-0.01 * sum([*ids("w3 w1 w2"), 2])))
    assert got == pytest.approx(want, rel=1e-6)


def test_one_program_for_each_bucket():
    traced = []

    def score_fn(params, tokens, mask):
        traced.append(tokens.shape)
        return tokens * 1.0

    scores = TokenScores(score_fn, None, batch_size=3)
    for lengths in [(5, 40, 7), (33,), (31, 32, 64, 60, 50, 49)]:
        found = scores([np.arange(length, dtype=np.int32) for length in lengths])
        for length, row in zip(lengths, found, strict=True):
            np.testing.assert_array_equal(row, np.arange(length))
    assert sorted(traced) == [(3, 32), (3, 64)]
    by_eights = TokenScores(score_fn, None, batch_size=1, bucket=lambda n: -(-n // 8) * 8)
    by_eights([np.zeros(9, np.int32)])
    assert traced[-1] == (1, 16)


def test_what_cannot_be_read_names_its_prompt():
    short = ModelReward.of(MODEL, text_format=TextFormat(max_length=3))
    with pytest.raises(ValueError, match=r"Prompt 'long': .*3 tokens.*Got: 4 tokens"):
        short([Prompt("short", "w1"), Prompt("long", "w1 w1 w1 w1")], [TextAnswer("w2")] * 2)
    foreign = ModelReward.of(make_model(word_tokenizer([f"v{i}" for i in range(100)])))
    with pytest.raises(ValueError, match=r"Prompt 'p': .*tokenizer does not fit"):
        foreign([Prompt("p", "v99")], [TextAnswer("v1")])


def test_nan_names_its_prompt():
    reward = ModelReward(lambda params, tokens, mask: tokens / 0.0 - tokens / 0.0, None, TOKENIZER)
    with pytest.raises(ValueError, match="prompt 'p' must be a finite number"):
        reward([Prompt("p", "w1")], [TextAnswer("w2")])


def test_what_a_reward_model_needs():
    with pytest.raises(ValueError, match=r"score head\. Got: head='logits'"):
        ModelReward.of(make_model(head="logits"))
    with pytest.raises(ValueError, match="there is no tokenizer"):
        ModelReward.of(dataclasses.replace(MODEL, tokenizer=None))
    with pytest.raises(ValueError, match="transform must be"):
        ModelReward.of(MODEL, transform="tanh")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ModelReward.of(MODEL, batch_size=0)
    last_only = ModelReward(lambda params, tokens, mask: tokens[:, -1], None, TOKENIZER)
    with pytest.raises(ValueError, match="score at every token"):
        last_only([Prompt("p", "w1")], [TextAnswer("w2")])


class TestProcessReward:
    PROMPT = Prompt("p", "w3")
    ANSWER = TextAnswer("w1 w2\n\n w4 \n\n\n\nw5 w6")
    STEP = TOKENIZER.get_vocab()["<step>"]

    def scores(self):
        """At the ends of the three steps, read from the prefixes."""
        step = [self.STEP]
        first = [*ids("w3 w1 w2"), *step]
        second = [*first, *ids("w4"), *step]
        third = [*second, *ids("w5 w6"), *step]
        return np.array([score_at_end(prefix) for prefix in (first, second, third)])

    def test_the_scores_at_the_ends_of_steps(self):
        reward = ProcessReward.of(MODEL, step_token="<step>", transform="identity")
        [steps] = reward.steps([self.PROMPT], [self.ANSWER])
        np.testing.assert_allclose(steps, self.scores(), atol=1e-5)
        assert np.std(steps) > 0.01

    @pytest.mark.parametrize(
        ("reduction", "reduce"),
        [("min", np.min), ("last", lambda x: x[-1]), ("mean", np.mean), ("product", np.prod)],
    )
    def test_one_number_from_them(self, reduction, reduce):
        reward = ProcessReward.of(MODEL, step_token="<step>", reduction=reduction)
        [got] = reward([self.PROMPT], [self.ANSWER])
        assert got == pytest.approx(reduce(1 / (1 + np.exp(-self.scores()))), abs=1e-5)

    def test_an_empty_answer_is_one_empty_step(self):
        reward = ProcessReward.of(MODEL, step_token="<step>", transform="identity")
        [got] = reward([self.PROMPT], [TextAnswer(" \n\n")])
        assert got == pytest.approx(score_at_end([*ids("w3"), self.STEP]), abs=1e-5)

    def test_what_it_needs(self):
        with pytest.raises(ValueError, match=r"in the vocabulary\. Got: '<stop>'"):
            ProcessReward.of(MODEL, step_token="<stop>")
        with pytest.raises(ValueError, match="reduction must be one of"):
            ProcessReward.of(MODEL, step_token="<step>", reduction="max")


@pytest.mark.slow
@pytest.mark.needs("torch")
def test_the_scores_of_transformers(tmp_path):
    from tests.models.references import VARIANTS, torch

    reference = VARIANTS[0].classifier()
    reference.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    model = from_pretrained(tmp_path / "model")
    prompts = [Prompt("p", CHAT if i % 2 else "w3") for i in range(6)]
    answers = [TextAnswer(text) for text in texts(6)]
    rewards = ModelReward.of(model, batch_size=4)(prompts, answers)
    for prompt, answer, reward in zip(prompts, answers, rewards, strict=True):
        tokens = render(TOKENIZER, prompt.conversation, answer=answer.text)
        with torch.no_grad():
            want = reference(torch.tensor(tokens, dtype=torch.long)[None]).logits[0, 0]
        assert reward == pytest.approx(float(want), abs=1e-4)
