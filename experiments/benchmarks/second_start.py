"""Seconds from the start of a run to its first sampled token, the first time and the second.

    python -m experiments.benchmarks.second_start

Starts the default run with nothing compiled, kills it after its first batch of answers, and starts
it with the same command again: programs come out of the compilation cache, finished stages out of
the workdir. The first token itself cannot be seen from outside without changing the program. Two
moments around it are: when the last program in front of it was compiled or loaded, the search's,
and when the first batch was finished, which is later by all tokens of its answers.

Expected: the second start has its first token within 15 seconds. `--elsewhere` adds a start in
another workdir, whose first stages have to be computed again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from absl import app, flags

from iro_jax.evaluation import markdown_table

_RUN = flags.DEFINE_string("run", "configs/smollm2.py", "Config of the run.")
_ELSEWHERE = flags.DEFINE_bool("elsewhere", False, "A third start, in a new workdir.")
_TIMEOUT = flags.DEFINE_integer("timeout", 3600, "Seconds that a start may take.")

MARK = "first batch:"
LARGEST_SECONDS = 15


def marked(line: str, start: float) -> tuple[float, float] | None:
    """Seconds to the search's program and to the first batch, if the line tells.

    >>> marked("first batch: 103.5 106.0", 100.0)
    (3.5, 6.0)
    """
    if not line.startswith(MARK):
        return None
    ready, done = map(float, line.removeprefix(MARK).split())
    return ready - start, done - start


def verdict(ready: float, done: float) -> str:
    """Whether the first token, which is sampled between the two moments, was there in time.

    >>> verdict(16.0, 20.0)
    'The second start has its first token after 16.0 s: not within 15 s'
    """
    if done <= LARGEST_SECONDS:
        return f"The second start has its first token before {done:.1f} s: in time"
    if ready > LARGEST_SECONDS:
        text = f"The second start has its first token after {ready:.1f} s"
        return f"{text}: not within {LARGEST_SECONDS} s"
    return (
        f"The second start has its first token between {ready:.1f} and {done:.1f} s, near the"
        " earlier one: it waits for the prompts to be read, the later one for all tokens"
    )


def started(workdir: Path, compiled: Path) -> tuple[float, float]:
    """Runs up to the first batch, and kills the run.

    Raises:
      RuntimeError: it ended, or was out of time, before.
    """
    command = [sys.executable, "-m", "experiments.benchmarks.first_batch"]
    command += [f"--config={_RUN.value}", f"--workdir={workdir}", "--noprogress"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.time()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        timer = threading.Timer(_TIMEOUT.value, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if (found := marked(line, start)) is not None:
                    return found
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        raise RuntimeError(f"No batch was finished: {errors.read()[-2000:]}")


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as folder:
        place, compiled = Path(folder), Path(folder) / "compiled"
        starts = {"first": place / "run", "second": place / "run"}
        if _ELSEWHERE.value:
            starts["second, in a new workdir"] = place / "other"
        found = {}
        for name, workdir in starts.items():
            found[name] = started(workdir, compiled)
            print(name, *(f"{seconds:.1f} s" for seconds in found[name]), flush=True)
    rows = [(name, *(f"{seconds:.1f}" for seconds in both)) for name, both in found.items()]
    print(markdown_table(("start", "s to the search's program", "s to the first batch"), rows))
    print(verdict(*found["second"]))


if __name__ == "__main__":
    app.run(main)
