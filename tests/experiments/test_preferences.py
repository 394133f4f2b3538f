"""Reward models from pairs: which pairs are read, and what is learned from them."""

import json

import numpy as np
import pytest

from configs.base import get_base, pairs_fields
from experiments import train_reward as command
from experiments.tasks.preferences import fitting_pairs, open_reward, read_pairs, train_reward
from iro_jax.data import PromptError
from iro_jax.models import from_pretrained
from iro_jax.values import AnswerTokens
from iro_jax.values.prefixes import prefix_values
from tests.experiments import tiny


def write_pairs(path, count=24):
    """The better answer has words w0 to w3, the worse one w30 to w33."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        good, bad = (" ".join(f"w{n + j}" for j in rng.permutation(4)) for n in (0, 30))
        rows.append({"prompt": f"w{i % 9} w{i // 9} w5", "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    tiny.write_model(folder / "model", tiny.WORDS)
    write_pairs(folder / "pairs.jsonl")
    return folder


def spec_of(root, trainable):
    spec = pairs_fields(str(root / "pairs.jsonl"))
    spec.update(trainable=trainable, held_out=0.25, max_tokens=64)
    spec.pairs.chat = False
    spec.fit.update(learning_rate=1e-2, batch_size=6, num_epochs=8)
    return spec


@pytest.mark.parametrize("trainable", ["head", "all"])
def test_held_out_pairs_are_told(root, tmp_path, trainable):
    model = from_pretrained(root / "model")
    spec = spec_of(root, trainable)
    name = str(root / "model")
    place = spec.pairs.source
    facts = train_reward(spec, place, model, tmp_path / "reward", name=name, layer=None)
    assert facts == {"pairs": 18, "held_out": 6, "pair_accuracy": 1.0}
    function = open_reward(tmp_path / "reward", model)
    # All weights: a network with a score head; a head: one on the backbone that it shares.
    assert (function.network.head is None) == (trainable == "all")
    tokens = AnswerTokens(model.tokenizer, model)
    _, held_out = fitting_pairs(spec, place, tokens)
    for pair in held_out:
        better, worse = (tokens(pair.prompt, x) for x in (pair.chosen, pair.rejected))
        a, b = prefix_values(function, [better, worse])
        assert a[-1] > b[-1]


def test_the_command_trains_once_and_leaves_a_reward_model(root, tmp_path):
    config = get_base()
    config.value.backbone = str(root / "model")
    config.task = {"name": "prompts", "reward": spec_of(root, "all")}
    facts = command.run(config, tmp_path / "run", progress=False)
    assert facts["pair_accuracy"] == 1.0
    assert from_pretrained(tmp_path / "run/reward/export").network.config.head == "score"
    assert command.run(config, tmp_path / "run", progress=False) == facts
    config.task.reward.path = "somewhere"
    with pytest.raises(ValueError, match=r"without a path.* Got: 'pairs'"):
        command.run(config, tmp_path / "other", progress=False)


def test_the_better_of_two_fields_is_named_by_a_third(tmp_path):
    rows = [
        {"prompt": "p", "a": "x", "b": "y", "best": "b"},
        {"prompt": "q", "a": "x", "b": "y", "best": "a"},
        {"prompt": "r", "a": "x", "b": "y", "best": None},
        {"prompt": "s", "a": "x", "b": "x", "best": "a"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"chosen_field": "a", "rejected_field": "b", "preferred_field": "best", "chat": False}
    found = read_pairs(str(path), **fields, preferred_values=("a", "b"))
    expected = [("p", "y", "x"), ("q", "x", "y")]
    texts = [(pair.prompt.conversation, pair.chosen.text, pair.rejected.text) for pair in found]
    assert texts == expected


def test_answers_may_be_conversations(tmp_path):
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}]
    path = tmp_path / "pairs.json"
    # An empty answer is one, and not a good one.
    path.write_text(json.dumps([{"prompt": "p", "chosen": turns, "rejected": ""}]))
    [pair] = read_pairs(str(path))
    assert pair.prompt.conversation == ({"role": "user", "content": "p"},)
    assert (pair.chosen.text, pair.rejected.text) == ("x", "")


def test_broken_pairs_are_named_and_long_ones_left_out(root, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "chosen": "x"}\n')
    with pytest.raises(PromptError, match=r"line 1: expected a prompt and two answers.*rejected"):
        read_pairs(str(path))
    model = from_pretrained(root / "model")
    spec = spec_of(root, "head")
    spec.max_tokens = 4
    with pytest.raises(PromptError, match=r"at least two pairs of up to 4 tokens\. Got: 0"):
        fitting_pairs(spec, spec.pairs.source, AnswerTokens(model.tokenizer, model))
