"""A run in seconds: a random policy of two layers, its prompts, and the configuration."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs.base import get_base, source_fields
from iro_jax.models import save_pretrained
from iro_jax.testing import tiny_pretrained, word_tokenizer

WORDS = [f"w{i}" for i in range(40)]


def write_model(folder: Path, words: list[str], *, seed: int = 0) -> None:
    save_pretrained(tiny_pretrained(word_tokenizer(words), seed=seed, origin=folder), folder)


def write_reward_model(folder: Path, words: list[str], *, seed: int = 2) -> None:
    tokenizer = word_tokenizer(words)
    save_pretrained(tiny_pretrained(tokenizer, head="score", seed=seed, origin=folder), folder)


def write_prompts(path: Path, count: int, *, first: int = 0) -> None:
    lines = [
        json.dumps({"id": f"p{i}", "prompt": f"{WORDS[i % 40]} {WORDS[(7 * i) % 40]} w1"})
        for i in range(first, first + count)
    ]
    path.write_text("\n".join(lines) + "\n")


def reward(conversation: object, text: str) -> float:
    """The share of words with an even number."""
    words = [word for word in text.split() if word.startswith("w")]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(len(words), 1)


def judge(conversation: object, text: str) -> float:
    """The number of words."""
    return float(len(text.split()))


def get_config(root: str) -> ConfigDict:
    """Of a run whose policy and prompts are in the folder `root`.

    With `+bridged` after it, value functions are heads on a model with another tokenizer.
    """
    root, _, variant = root.partition("+")
    config = get_base()
    if variant == "bridged":
        config.value.backbone = f"{root}/values"
    config.name = "tiny"
    config.policy.name = f"{root}/policy"
    config.mesh.data = 1
    config.task = ConfigDict(
        {
            "name": "prompts",
            "train": source_fields(f"{root}/train.jsonl"),
            "evaluation": source_fields(f"{root}/evaluation.jsonl"),
            "reward": {"kind": "python", "target": "tests.experiments.tiny:reward"},
            "judge": {"kind": "python", "target": "tests.experiments.tiny:judge"},
        }
    )
    for part in (config.task.train, config.task.evaluation):
        part.id_field = "id"
    config.search.update(
        max_new_tokens=6, beam_width=2, num_successors=2, chunk_length=2, batch_size=4, shard_size=4
    )
    config.search.sampling.update(temperature=1.0, top_k=20)
    config.loop.update(num_iterations=2, betas=(1.0, 2.0), prompts_per_iteration=8, held_out=0.25)
    config.value.head.hidden = (8,)
    config.value.layer = 1
    for fit in (config.value.fit, config.value.compression):
        fit.update(learning_rate=1e-2, batch_size=8, num_epochs=3)
    return config


def write_all(root: Path) -> None:
    write_model(root / "policy", WORDS)
    write_model(root / "values", WORDS[::-1], seed=1)
    write_prompts(root / "train.jsonl", 20)
    write_prompts(root / "evaluation.jsonl", 6, first=100)
