"""Several hosts, here processes with one device each, end where one ends, killed or not."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from iro_jax.data import RolloutStore
from iro_jax.evaluation import Ledger
from tests.conftest import FAST_TO_COMPILE
from tests.experiments import tiny

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def start(root: Path, workdir: Path, count: int) -> list[subprocess.Popen]:
    """As many processes of one run; each has one device and searches batches of four prompts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": FAST_TO_COMPILE,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        *(sys.executable, "-m", "experiments.run", "--noprogress"),
        *(f"--config=tests/experiments/tiny.py:{root}", f"--workdir={workdir}"),
        *("--config.mesh.data=-1", "--config.search.shard_size=2", "--config.value.trainable=all"),
        "--config.loop.compress=False",
    ]
    hosts = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [*command, *([*hosts, f"--process_id={index}"] if count > 1 else [])],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said[-3000:]


def rollouts(folder: Path) -> dict[tuple[str, int], object]:
    store = RolloutStore.open(folder)
    store.verify()
    assert store.complete
    return {(rollout.prompt.id, rollout.candidate): rollout for rollout in store.all()}


def assert_same(workdir: Path, expected: Path) -> None:
    stores = sorted(path.parent for path in expected.glob("**/manifest.json"))
    assert len(stores) >= 6
    for folder in stores:
        if folder == expected:
            continue
        ours, theirs = rollouts(workdir / folder.relative_to(expected)), rollouts(folder)
        assert ours.keys() == theirs.keys()
        for name, rollout in theirs.items():
            np.testing.assert_array_equal(ours[name].tokens, rollout.tokens)
            np.testing.assert_allclose(ours[name].log_probs, rollout.log_probs, atol=1e-5)
            assert ours[name].reward == rollout.reward
    for rows in expected.glob("eval/*/outputs.jsonl"):
        assert (workdir / rows.relative_to(expected)).read_text() == rows.read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    tiny.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def alone(root):
    finish(start(root, root / "alone", 1))
    return root / "alone"


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_a_run(root, alone, count):
    workdir = root / f"of_{count}"
    finish(start(root, workdir, count))
    assert_same(workdir, alone)
    # Every host has paid for shards of its own, and the whole is what one host paid.
    assert len(list(workdir.glob("cost*.jsonl"))) == count
    ours, theirs = (Ledger(folder / "cost.jsonl").totals() for folder in (workdir, alone))
    assert ours.tokens_sampled == theirs.tokens_sampled
    assert ours.reward_queries == theirs.reward_queries


def test_a_run_goes_on_when_a_host_was_killed(root, alone):
    workdir = root / "killed"
    processes = start(root, workdir, 2)
    # In the middle of the second iteration's rollouts.
    waited = time.monotonic() + 600
    while not list(workdir.glob("iter_1/rollouts/*.arrayrecord")):
        assert time.monotonic() < waited
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    processes[0].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    finish(start(root, workdir, 2))
    assert_same(workdir, alone)


def test_hosts_that_do_not_meet_are_told_so(root):
    command = [
        *(sys.executable, "-m", "experiments.run", "--distributed", "--noprogress"),
        *(f"--config=tests/experiments/tiny.py:{root}", f"--workdir={root / 'nowhere'}"),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1].startswith("ValueError: The hosts did not meet")
    assert not (root / "nowhere").exists()
