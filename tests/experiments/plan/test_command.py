"""The command, for GPUs: nothing is compiled."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]


def plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.plan", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", ["smollm2", "tldr:6.9b", "ultrafeedback:8b", "ultrafeedback:70b", "math"]
)
def test_every_experiment_can_be_planned(config):
    name, _, variant = config.partition(":")
    file = f"configs/{name}.py" + (f":{variant}" if variant else "")
    done = plan(f"--config={file}", "--topology=gpu:h100x8")
    assert done.returncode == 0, done.stderr
    # A line for each number of value functions, and a stage for each of their fits.
    functions = len(re.findall(r"^\| guided by \d", done.stdout, re.MULTILINE))
    fits = len(re.findall(r"^\| value function \d", done.stdout, re.MULTILINE))
    assert functions == fits > 0
    total = re.search(r"^\| together \|  \|  \| ([\d,.e-]+) \|", done.stdout, re.MULTILINE)
    assert float(total[1].replace(",", "")) > 0


@pytest.mark.slow
def test_seventy_billion_do_not_fit_on_one_device():
    arguments = ("--topology=gpu:h100", "--config.mesh.model=1")
    done = plan("--config=configs/ultrafeedback.py:70b", *arguments)
    assert "it does NOT fit" in done.stdout
    # Two bytes for each of 70.55 billion parameters.
    assert "| weights of the policy | 141.107 |" in done.stdout


def test_an_unknown_topology_is_one_line():
    done = plan("--config=configs/smollm2.py", "--topology=abacus:2x2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: A topology is a TPU slice")
