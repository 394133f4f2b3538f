"""The script that draws Theorem 1's gap and bound."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULE = "experiments.benchmarks.theorem1"


def python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.needs("matplotlib")
def test_table_and_picture(tmp_path):
    picture = tmp_path / "theorem1.png"
    done = python("-m", MODULE, "--models=2", "--longest=4096", f"--out={picture}")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith((" 2 ", "mean"))]
    assert len(rows) == 3
    for *_, gap, bound, slope, bound_slope in rows:
        assert float(gap) < float(bound) < 0.5
        assert float(slope) < float(bound_slope) == -0.43
    assert picture.read_bytes()[1:4] == b"PNG"


def test_without_matplotlib_the_extra_is_named_before_the_work(tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.modules['matplotlib'] = None\n"
        f"sys.argv = ['theorem1', '--longest=1000000', '--out={tmp_path / 'theorem1.png'}']\n"
        f"runpy.run_module({MODULE!r}, run_name='__main__')\n"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert "pip install iro_jax[plots]" in done.stdout + done.stderr
