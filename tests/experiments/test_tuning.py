"""Rivals that touch weights, on a tiny task: every stage, its export, and a second call."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.tuning import tuning_fields
from experiments import tuning
from iro_jax.data import Prompt, Rollout
from iro_jax.models import from_pretrained
from tests.experiments import tiny


def rollout(text, reward):
    numbers = {"tokens": np.array([5]), "prompt_tokens": np.array([4]), "log_probs": np.zeros(1)}
    fields = {"iteration": 0, "candidate": 0, "selected": False, "finished": True}
    return Rollout(prompt=Prompt("p", "q"), text=text, reward=reward, **numbers, **fields)


def test_pairs_are_ranked_and_ties_are_none():
    some = [
        rollout(text, reward) for text, reward in zip("abcdef", [1, 5, 3, 3, 2, 5], strict=True)
    ]
    pairs = tuning.ranked_pairs(some, count=4)
    # b f c | d e a, in falling order
    assert [(pair.chosen.text, pair.rejected.text) for pair in pairs] == [
        ("b", "d"),
        ("f", "e"),
        ("c", "a"),
    ]
    assert len(tuning.ranked_pairs(some, count=1)) == 1
    level = [dataclasses.replace(one, reward=1.0) for one in some]
    assert tuning.ranked_pairs(level, count=4) == []


@pytest.mark.slow
def test_all_methods_are_trained_exported_and_not_trained_again(tmp_path, monkeypatch):
    tiny.write_all(tmp_path)
    config = tiny.get_config(str(tmp_path))
    config.tuning = tuning_fields()
    config.tuning.update(num_prompts=12, held_out=0.25, answers=2)
    for name in ("grpo", "irepo"):
        config.tuning[name].update(rounds=2, prompts_per_round=4, answers=4)
    for name in config.tuning.methods:
        config.tuning[name].fit.update(learning_rate=1e-2)
    folder = tmp_path / "tuning"
    table = tuning.run(config, folder, progress=False)
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == [
        "base",
        "best of 2 by the reward",
        tuning.REWARD_MODEL,
        "dpo",
        "grpo",
        "irepo",
    ]
    before = from_pretrained(tmp_path / "policy")
    for name in tuning.POLICIES:
        after = from_pretrained(folder / name / "export")
        assert after.network == before.network
        changed = [
            not np.array_equal(a, b) for a, b in zip(leaves(after), leaves(before), strict=True)
        ]
        assert any(changed)

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    for name in tuning.POLICIES:
        monkeypatch.setitem(tuning.POLICIES, name, refuse)
    assert tuning.run(config, folder, progress=False) == table
    assert (folder / "table.md").read_text() == table
    config.tuning.methods = ("ppo",)
    with pytest.raises(ValueError, match=r"must be of .* Got: \{'ppo'\}"):
        tuning.run(config, tmp_path / "other", progress=False)


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]
