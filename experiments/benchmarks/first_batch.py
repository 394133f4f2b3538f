"""`experiments.run` that tells when its first batch of answers is there; see `second_start.py`.

It prints one line, `MARK ready done`, of two times since the epoch: when the last program before
the end of the first batch was compiled or loaded, and when that batch was finished. The first
token is sampled in between.
"""

from __future__ import annotations

import time

import jax
from absl import app

from experiments import command, run
from experiments.benchmarks.second_start import MARK
from iro_jax.guidance import guide
from iro_jax.search import SearchOutput

_COMPILED = "/jax/core/compile/backend_compile_duration"


def watch() -> None:
    """Has the next search print the mark. The program of the search stays what it is."""
    ready = [time.time()]
    check_scores = guide.check_scores

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == _COMPILED:
            ready[0] = time.time()

    def checked(output: SearchOutput, first: int = 0) -> None:
        guide.check_scores = check_scores
        last_compiled = ready[0]
        jax.block_until_ready(output)
        print(MARK, last_compiled, time.time(), flush=True)
        check_scores(output, first)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    guide.check_scores = checked


if __name__ == "__main__":
    watch()
    app.run(run.main, flags_parser=command.parse_flags)
