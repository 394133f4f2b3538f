"""Value functions: what they read, their adapters, and what of them a search needs."""

import dataclasses

import jax
import numpy as np
import pytest

from iro_jax.data import Prompt
from iro_jax.models import TextFormat
from iro_jax.rewards import TextAnswer
from iro_jax.testing import word_tokenizer
from iro_jax.values import (
    AnswerTokens,
    Head,
    merge_adapters,
    new_head,
    standalone,
    with_adapters,
)
from tests.values import cases

MODEL = cases.model()
TEXT = np.random.default_rng(0).integers(4, 49, (2, 12)).astype(np.int32)
MASK = np.ones(TEXT.shape, bool)
CHAT = [{"role": "user", "content": "w1 w2"}]


def values(network, params):
    return np.asarray(jax.jit(network.forward)(params, TEXT, MASK))[..., 0]


def adapted(function, **options):
    """With adapters that do change something."""
    function = with_adapters(function, seed=0, **options)
    noise = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), function.params.adapters
    )
    return function.with_params(dataclasses.replace(function.params, adapters=noise))


class TestAdapters:
    def test_change_nothing_at_first(self):
        function = cases.score_function()
        with_some = with_adapters(function, rank=3, seed=0)
        assert not with_some.frozen
        np.testing.assert_array_equal(
            values(with_some.network, with_some.params), values(function.network, function.params)
        )

    @pytest.mark.parametrize(
        ("function", "targets"),
        [
            (new_head(MODEL, Head((4,)), layer=1), ("up",)),
            (cases.score_function(), ("qkv", "output", "up", "down")),
        ],
    )
    def test_merged_they_give_the_same_values(self, function, targets):
        plain = values(function.network, function.params)
        before = [np.asarray(x).copy() for x in jax.tree.leaves(function.params.backbone)]
        function = adapted(function, rank=3, targets=targets)
        merged = merge_adapters(function)
        assert not merged.network.adapters
        assert merged.source is None
        want = values(function.network, function.params)
        assert np.abs(want - plain).max() > 1e-3
        found = values(merged.network, merged.params)
        np.testing.assert_allclose(found, want, atol=1e-4, rtol=1e-4)
        for x, y in zip(jax.tree.leaves(function.params.backbone), before, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_once_only(self):
        with pytest.raises(ValueError, match="has adapters already"):
            with_adapters(adapted(new_head(MODEL, Head()), rank=2), rank=2, seed=0)


@pytest.mark.parametrize("adapters", [False, True])
def test_alone_it_does_without_the_blocks_above_its_layer(adapters):
    function = new_head(MODEL, Head((4,)), layer=1)
    if adapters:
        function = adapted(function, rank=2)
    network, params = standalone(function)
    assert network.network.config.num_layers == 1
    assert len(jax.tree.leaves(params)) < len(jax.tree.leaves(function.params))
    np.testing.assert_array_equal(
        values(network, params), values(function.network, function.params)
    )
    final = new_head(MODEL, Head())
    assert standalone(final) == (final.network, final.params)


class TestAnswerTokens:
    PROMPT = Prompt("raw", "w1 w2")

    def test_with_the_policys_tokenizer_they_are_what_was_sampled(self):
        # Not what the text would give, which the policy did not write like this.
        answer = TextAnswer("w3", tokens=(12, 0, 13, cases.EOS))
        for tokenizer in (cases.TOKENIZER, word_tokenizer(cases.WORDS)):
            prompt, tokens = AnswerTokens(tokenizer, MODEL)(self.PROMPT, answer)
            assert prompt.tolist() == cases.TOKENIZER("w1 w2")["input_ids"]
            assert tokens.tolist() == [12, 0, 13, cases.EOS]

    def test_prompts_are_read_as_the_policy_reads_them(self):
        other = word_tokenizer(cases.WORDS)
        other.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}<turn>"
        read = AnswerTokens(other, MODEL)
        prompt, _ = read(Prompt("chat", CHAT), TextAnswer("w3", tokens=(12,)))
        assert cases.TOKENIZER.decode(prompt) == "<turn> user w1 w2 </turn> <turn> assistant"

    def test_with_another_tokenizer_they_are_its_text_and_its_end(self):
        other = word_tokenizer([*reversed(cases.WORDS)])
        read = AnswerTokens(other, MODEL)
        sampled = (12, 13, cases.EOS)
        for prompt, end in ((self.PROMPT, "<eos>"), (Prompt("chat", CHAT), "</turn>")):
            asked, done = read(prompt, TextAnswer("w3 w4", tokens=sampled, finished=True))
            # A stop string may have ended it: the policy's end was not sampled.
            _, cut = read(prompt, TextAnswer("w3", tokens=sampled[:2], finished=True))
            assert other.decode(asked).startswith(("w1 w2", "<turn> user w1 w2"))
            assert other.decode(done) == f"w3 w4 {end}"
            assert other.decode(cut) == "w3 w4"

    @pytest.mark.parametrize("words", [cases.WORDS, cases.WORDS[::-1]])
    def test_what_nobody_sampled_is_read_as_text(self, words):
        read = AnswerTokens(word_tokenizer(words), MODEL)
        _, ended = read(self.PROMPT, TextAnswer("w3 w4"))
        _, cut = read(self.PROMPT, TextAnswer("w3 w4", finished=False))
        assert read.tokenizer.decode(ended) == "w3 w4 <eos>"
        assert read.tokenizer.decode(cut) == "w3 w4"

    def test_a_prompt_that_cannot_be_read_is_named(self):
        read = AnswerTokens(cases.TOKENIZER, MODEL, text_format=TextFormat(max_length=1))
        with pytest.raises(ValueError, match="Prompt 'raw': The prompt is longer than the 1"):
            read.check([Prompt("short", "w1"), self.PROMPT])

    def test_prompts_have_the_runs_format(self):
        read = AnswerTokens(
            cases.TOKENIZER,
            MODEL,
            text_format=TextFormat(max_length=1, truncation="left"),
        )
        prompt, _ = read(self.PROMPT, TextAnswer("w3", tokens=(12,)))
        assert cases.TOKENIZER.decode(prompt) == "w2"
