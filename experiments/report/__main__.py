"""`python -m experiments.report --workdir=runs/smollm2`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiments.report.page import write_page
from iro_jax.evaluation import LedgerError
from iro_jax.workdir import WorkdirError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
_ANSWERS = flags.DEFINE_integer(
    "answers", 1000, "Over how many answers training is spread where costs are compared."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "The file to write; by default report/index.html in the run's folder."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments. Got: {' '.join(argv[1:])}")
    target = None if _OUTPUT.value is None else Path(_OUTPUT.value)
    try:
        print(write_page(Path(_WORKDIR.value), answers=_ANSWERS.value, target=target))
    except (WorkdirError, LedgerError, ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
