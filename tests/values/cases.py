"""A tiny backbone with words to read, and rollouts of answers to a few prompts."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np

from iro_jax.data import Prompt, Rollout, RolloutStore
from iro_jax.models import Pretrained
from iro_jax.testing import tiny_pretrained, word_tokenizer
from iro_jax.values import AnswerTokens, ValueFunction, ValueNetwork, ValueParams

WORDS = [f"w{i}" for i in range(40)]
TOKENIZER = word_tokenizer(WORDS)
VOCABULARY = 56
EOS = TOKENIZER.eos_token_id
FIRST_WORD = len(TOKENIZER) - len(WORDS)
SHARD = 2
"""Prompts of a store's shard."""


def model(**options) -> Pretrained:
    """A tiny backbone; its embedding has rows that no token uses."""
    return tiny_pretrained(**{"tokenizer": TOKENIZER, "vocab_size": VOCABULARY} | options)


def score_function(seed: int = 0) -> ValueFunction:
    """A reward model as a value function."""
    scored = model(head="score", seed=seed)
    return ValueFunction(scored, ValueNetwork(scored.network), ValueParams(scored.params))


def rollouts(prompts: int = 6, candidates: int = 3, *, seed: int = 0) -> list[Rollout]:
    """Answers of 1 to 8 words, every other one finished, with rewards in 0..1."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(prompts):
        asked = rng.integers(FIRST_WORD, len(TOKENIZER), rng.integers(1, 6))
        prompt = Prompt(f"p{number}", TOKENIZER.decode(asked))
        for candidate in range(candidates):
            words = rng.integers(FIRST_WORD, len(TOKENIZER), rng.integers(1, 9))
            finished = (number + candidate) % 2 == 0
            found.append(
                Rollout(
                    prompt=prompt,
                    prompt_tokens=asked,
                    tokens=np.append(words, [EOS] * finished),
                    text=TOKENIZER.decode(words),
                    finished=finished,
                    reward=float(np.mean(words % 2 == 0)),
                    log_probs=np.zeros(len(words) + finished),
                    iteration=0,
                    candidate=candidate,
                    selected=False,
                )
            )
    return found


def store(folder: Path, some: list[Rollout]) -> RolloutStore:
    """The rollouts on disk, a few prompts a shard."""
    ids = list(dict.fromkeys(rollout.prompt.id for rollout in some))
    plan = [ids[start : start + SHARD] for start in range(0, len(ids), SHARD)]
    made = RolloutStore.create(folder, config_hash="tiny", plan=plan)
    for number, shard in enumerate(plan):
        made.write(number, [rollout for rollout in some if rollout.prompt.id in shard])
    return made


def answer_tokens() -> AnswerTokens:
    return AnswerTokens(TOKENIZER, model())


def whole_values(function: ValueFunction, prompt, answer) -> np.ndarray:
    """V after the prompt and after each token of the answer, by a pass over them alone."""
    text = np.concatenate([prompt, answer])
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, -len(text) :] = text
    mask = np.arange(40)[None] >= 40 - len(text)
    values = _forward(function.network, function.params, tokens, mask)
    return np.asarray(values)[0, -len(answer) - 1 :, 0]


@functools.partial(jax.jit, static_argnums=0)
def _forward(network: ValueNetwork, params, tokens, mask):
    return network.forward(params, tokens, mask)
