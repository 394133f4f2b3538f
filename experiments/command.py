"""What the commands share: their flags, how they start, and which errors they tell in one line."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from iro_jax.data import PromptError, RolloutError
from iro_jax.evaluation import LedgerError
from iro_jax.models import CheckpointError
from iro_jax.values import FitError
from iro_jax.workdir import WorkdirError

CONFIG = config_flags.DEFINE_config_file("config", None, "What to run.", lock_config=True)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; by default runs/NAME, NAME being the config's."
)
PROGRESS = flags.DEFINE_bool("progress", True, "Whether to show progress bars.")

# What a user can put right, told without a stack of frames.
EXPECTED = (
    CheckpointError,
    FitError,
    LedgerError,
    PromptError,
    RolloutError,
    WorkdirError,
    ValueError,
    OSError,
    ImportError,
)


@contextlib.contextmanager
def started(argv: Sequence[str]) -> Iterator[None]:
    """Sets up the process; in the body, what a user can put right ends it with one line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments. Got: {' '.join(argv[1:])}")
    keep_compiled()
    quiet_libraries()
    spare_collector()
    try:
        yield
    except EXPECTED as error:
        if os.environ.get("IRO_JAX_TRACEBACK"):
            raise
        sys.exit(f"{type(error).__name__}: {error}")


def keep_compiled() -> None:
    """Programs that were compiled once are found again by the next run."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "iro_jax" / "compiled"))
    name = "jax_persistent_cache_min_compile_time_secs"
    if getattr(jax.config, name) == 1:  # JAX's default; a start has many programs that take less
        jax.config.update(name, 0.1)


def quiet_libraries() -> None:
    """Orbax tells of every step that it takes, and JAX of every platform that it does not find."""
    for library in ("absl", "jax._src.xla_bridge"):
        logging.getLogger(library).setLevel(logging.WARNING)


def spare_collector() -> None:
    """What is there now stays to the end: Python need not look through it for garbage.

    With a policy's vocabulary and a task's texts among it, looking takes seconds of a start.
    """
    gc.freeze()


def parse_flags(argv: list[str]) -> list[str]:
    """Flags, with one line where a configuration is given a field that it does not have."""
    flags.mark_flag_as_required("config")
    try:
        return flags.FLAGS(argv)
    except AttributeError as error:
        cause = error.args[0]
        text = cause.args[0] if isinstance(cause, Exception) else cause
        sys.exit(f"The configuration has no such field: {text}")
    except flags.Error as error:
        sys.exit(f"{error}\nUsage: python -m COMMAND --config=FILE [--workdir=FOLDER]")
