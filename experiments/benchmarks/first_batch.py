"""`experiments.run` that tells when its first batch of answers is there; see `second_start.py`.

It prints one line, `MARK loaded sampled done`, of three times since the epoch: when the last
program before the end of the first batch was compiled or loaded, which is the search's; by when the
first token was sampled; and when the batch was finished. Nothing can be seen inside of a program,
so that the second is a bound from above: the first, and what the same program takes for the same
prompts if answers have one token.
"""

from __future__ import annotations

import time
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app

from experiments import command, run
from experiments.benchmarks.second_start import MARK
from iro_jax.guidance import guide
from iro_jax.models.generate import KeyedBatch
from iro_jax.search import SearchOutput

_COMPILED = "/jax/core/compile/backend_compile_duration"


def watch() -> None:
    """Has the next search print the mark. The program of the search stays what it is."""
    last = [time.time()]

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == _COMPILED:
            last[0] = time.time()

    def searched(self: guide.Guide, batch: KeyedBatch) -> SearchOutput:
        patched.stop()
        # The check compiles something itself.
        with mock.patch.object(guide, "check_scores"):
            output = jax.block_until_ready(self._search_batch(batch))
        loaded, done = last[0], time.time()
        print(MARK, loaded, loaded + _first_token(self, batch), done, flush=True)
        guide.check_scores(output)
        return output

    jax.monitoring.register_event_duration_secs_listener(compiled)
    patched = mock.patch.object(guide.Guide, "_search_batch", searched)
    patched.start()


def _first_token(search: guide.Guide, batch: KeyedBatch) -> float:
    """Seconds of the same program for answers of one token."""
    [(tokens, mask)] = [(prompts.tokens, prompts.mask) for prompts in batch.prompts]
    _, program = search._programs[0]
    limit = jnp.ones(search.batch_size, jnp.int32)
    start = time.time()
    jax.block_until_ready(program(search.params, batch.keys, tokens, mask, limit, None))
    return time.time() - start


if __name__ == "__main__":
    watch()
    app.run(run.main, flags_parser=command.parse_flags)
