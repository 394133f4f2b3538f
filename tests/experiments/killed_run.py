"""The command of a run that kills itself at a moment that a seed chooses.

Moments are counted in what Python does to files: opening for writing, renaming, deleting, making
folders; the kill follows one of them by up to 30 ms, so that it also falls into writes that are
under way. Seed 0 kills nothing.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import jax
from absl import app

import experiments.run

COUNTED = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
MOMENTS = 60


class Moments:
    """Counts moments in the run's folder, and kills at the chosen one."""

    def __init__(self, seed: int, workdir: str):
        chosen = random.Random(seed)
        self.last = chosen.randrange(MOMENTS) if seed else None
        self.delay = chosen.uniform(0, 0.03)
        self.workdir = os.path.abspath(workdir)
        self.count = 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & 3)
        if not writes and event not in COUNTED:
            return
        if not str(arguments[0]).startswith(self.workdir):
            return
        self.count += 1
        if self.count - 1 == self.last:
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        time.sleep(self.delay)
        os.kill(os.getpid(), signal.SIGKILL)


def run(seed: int, arguments: list[str], cache: Path) -> None:
    """`python -m experiments.run` with `arguments`, in a process that lasts no longer.

    Args:
      cache: where compiled programs are kept for the next process.
    """
    [workdir] = [a.partition("=")[2] for a in arguments if a.startswith("--workdir=")]
    sys.addaudithook(Moments(seed, workdir))
    sys.argv = ["experiments.run", *arguments]
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        app.run(experiments.run.main)
    except SystemExit as done:
        # Threads of libraries need not end by themselves.
        sys.stdout.flush()
        os._exit(done.code if isinstance(done.code, int) else int(done.code is not None))
