"""A run that is killed again and again ends where one that was never killed ends, bit for bit."""

import json
import multiprocessing
import signal
from pathlib import Path

import pytest
import safetensors.numpy

from iro_jax.data import RolloutStore
from iro_jax.evaluation import Entry, Ledger
from tests.experiments import killed_run, tiny

# Everything that takes time to import, and nothing that starts JAX's threads.
_PRELOADED = ["tests.experiments.killed_run", "experiments.run", "experiments.tasks.prompts"]

pytestmark = pytest.mark.slow


def run(folder: Path, variant: str, workdir: Path, seed: int) -> int | None:
    """One process; its exit code, negative if a signal ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    arguments = [f"--config=tests/experiments/tiny.py:{folder}{variant}", f"--workdir={workdir}"]
    process = context.Process(
        target=killed_run.run, args=(seed, [*arguments, "--noprogress"], folder / "compiled")
    )
    process.start()
    process.join()
    return process.exitcode


def contents(workdir: Path) -> dict[str, object]:
    """What a run has found: rollouts, value functions, answers, and what it says of them."""
    found: dict[str, object] = {}
    for manifest in sorted(workdir.glob("**/manifest.json")):
        name = str(manifest.relative_to(workdir))
        if manifest.parent != workdir:
            store = RolloutStore.open(manifest.parent)
            store.verify()
            found[name] = [rollout.to_bytes() for rollout in store.all()]
    for weights in sorted(workdir.glob("**/export/*.safetensors")):
        arrays = safetensors.numpy.load(weights.read_bytes())
        found[str(weights.relative_to(workdir))] = {
            key: (array.dtype, array.tobytes()) for key, array in arrays.items()
        }
    for rows in sorted(workdir.glob("eval/*/outputs.jsonl")):
        found[str(rows.relative_to(workdir))] = rows.read_text()
    found["costs"] = [counts(entry) for entry in Ledger(workdir / "cost.jsonl").entries()]
    found["stages"] = json.loads((workdir / "manifest.json").read_text())["stages"]
    return found


def counts(entry: Entry) -> dict[str, object]:
    """An entry of the ledger without what depends on the machine's mood."""
    mood = ("seconds", "compile_seconds", "peak_memory_bytes")
    return {name: value for name, value in entry.to_json().items() if name not in mood}


def stages(workdir: Path) -> int:
    path = workdir / "manifest.json"
    return len(json.loads(path.read_text())["stages"]) if path.exists() else 0


@pytest.mark.parametrize(("variant", "kills"), [("", 20), ("+bridged", 5)])
def test_killed_runs_end_as_one_that_was_not(tmp_path, variant, kills):
    tiny.write_all(tmp_path)
    whole = tmp_path / "whole"
    assert run(tmp_path, variant, whole, seed=0) == 0
    expected = contents(whole)
    assert {"stages", "eval/base/outputs.jsonl"} <= set(expected)
    killed_in, attempt, seed = [], 0, 0
    while len(killed_in) < kills:
        workdir = tmp_path / f"killed_{attempt}"
        attempt += 1
        code = None
        while code != 0:
            seed += 1
            code = run(tmp_path, variant, workdir, seed if len(killed_in) < kills else 0)
            if code != 0:
                assert code == -signal.SIGKILL
                killed_in.append(stages(workdir))
        actual = contents(workdir)
        assert actual.keys() == expected.keys()
        for name in expected:
            assert actual[name] == expected[name], name
    assert len(set(killed_in)) >= min(kills, len(expected["stages"])) / 2, killed_in
