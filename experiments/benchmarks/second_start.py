"""Seconds from the start of a run to its first sampled token, the first time and the second.

    python -m experiments.benchmarks.second_start

Starts the default run with nothing compiled, kills it after its first batch of answers, and starts
it with the same command again: programs come out of the compilation cache, finished stages out of
the workdir. Three moments are told: when the last program in front of the first token was
compiled or loaded, the search's; by when the first token was sampled, a bound from above (see
`first_batch.py`); and when the first batch was finished, with all tokens of its answers.

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
from typing import TypeAlias

from absl import app, flags

from iro_jax.evaluation import markdown_table

_RUN = flags.DEFINE_string("run", "configs/smollm2.py", "Config of the run.")
_ELSEWHERE = flags.DEFINE_bool("elsewhere", False, "A third start, in a new workdir.")
_TIMEOUT = flags.DEFINE_integer("timeout", 3600, "Seconds that a start may take.")

MARK = "first batch:"
Moments: TypeAlias = tuple[float, float, float]
HEADER = ("start", "s to the search's program", "s to the first token", "s to the first batch")
LARGEST_SECONDS = 15


def marked(line: str, start: float) -> Moments | None:
    """Seconds to the search's program, the first token and the first batch, if the line tells.

    >>> marked("first batch: 103.5 104.0 106.0", 100.0)
    (3.5, 4.0, 6.0)
    """
    if not line.startswith(MARK):
        return None
    loaded, sampled, done = map(float, line.removeprefix(MARK).split())
    return loaded - start, sampled - start, done - start


def verdict(sampled: float) -> str:
    """Whether the first token was there in time.

    >>> verdict(16.0)
    'The second start has its first token by 16.0 s: not within 15 s'
    """
    told = "in time" if sampled <= LARGEST_SECONDS else f"not within {LARGEST_SECONDS} s"
    return f"The second start has its first token by {sampled:.1f} s: {told}"


def started(workdir: Path, compiled: Path) -> Moments:
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
    rows = [(name, *(f"{seconds:.1f}" for seconds in moments)) for name, moments in found.items()]
    print(markdown_table(HEADER, rows))
    print(verdict(found["second"][1]))


if __name__ == "__main__":
    app.run(main)
