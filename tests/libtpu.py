"""Programs that libtpu compiles for TPUs that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]


def compiled_by(module: str, *arguments: str) -> Any:
    """What a module of the tests prints last, as JSON. It loads libtpu in a process of its own."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install libtpu")
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        # It may be loaded elsewhere too: no TPU is touched.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Other tests' settings are for other programs.
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
