"""The store: what is written comes back, bit for bit, and nothing that was written is lost."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys

import grain
import numpy as np
import pytest

from iro_jax import files
from iro_jax.data import Prompt, Rollout, RolloutError, RolloutStore, store

PLAN = [["a", "b"], ["c"], ["d", "e"]]


def sample(id, candidate, length=None):
    """A rollout that is a function of its id and number, as sampling is."""
    rng = np.random.default_rng([ord(id), candidate])
    length = candidate + 3 if length is None else length
    return Rollout(
        prompt=Prompt(id, [{"role": "user", "content": f"What is {id}? ü"}], {"gold": [1, 2.5]}),
        prompt_tokens=rng.integers(0, 50_000, 5),
        tokens=rng.integers(0, 50_000, length),
        text=f"An answer\u2028to {id}",
        finished=candidate % 2 == 0,
        reward=float(rng.normal()),
        log_probs=rng.normal(size=length),
        iteration=2,
        candidate=candidate,
        selected=candidate == 1,
        score=float(rng.normal()),
    )


def shard(number):
    return [sample(id, candidate) for id in PLAN[number] for candidate in range(3)]


def create(folder, config_hash="hash", plan=PLAN):
    return RolloutStore.create(folder, config_hash=config_hash, plan=plan)


def fill(opened):
    for number in opened.missing():
        opened.write(number, shard(number))
    return opened


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(found, expected):
    for name in Rollout.__dataclass_fields__:
        one, other = getattr(found, name), getattr(expected, name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, strict=True)
        else:
            assert one == other
            assert type(one) is type(other)


class TestRollout:
    def test_every_field_survives(self):
        for rollout in (sample("a", 0), sample("b", 1, length=0)):
            assert_same(Rollout.from_bytes(rollout.to_bytes()), rollout)

    def test_extreme_numbers_survive(self):
        rollout = sample("a", 2, length=4)
        values = {
            "reward": 0.1 + 0.2,
            "tokens": [0, 2**31 - 1, -1, 7],
            "log_probs": np.float32([-np.inf, -1e-45, -0.0, 3.4e38]),
        }
        rollout = Rollout(**{**vars(rollout), **values})
        found = Rollout.from_bytes(rollout.to_bytes())
        assert_same(found, rollout)
        assert found.log_probs.tobytes() == values["log_probs"].tobytes()

    def test_equal_rollouts_give_equal_bytes(self):
        assert sample("a", 1).to_bytes() == sample("a", 1).to_bytes()
        assert sample("a", 1).to_bytes() != sample("a", 2).to_bytes()

    @pytest.mark.parametrize(
        "changed",
        [
            {"reward": float("nan")},
            {"reward": float("inf")},
            {"log_probs": np.zeros(2)},
            {"tokens": np.zeros((2, 2))},
        ],
    )
    def test_malformed_ones_are_refused(self, changed):
        with pytest.raises(ValueError, match="Got: "):
            Rollout(**{**vars(sample("a", 0)), **changed})

    def test_another_schema_is_refused(self, monkeypatch):
        record = sample("a", 0).to_bytes()
        monkeypatch.setattr("iro_jax.data.rollouts.SCHEMA", 99)
        with pytest.raises(ValueError, match="schema 99"):
            Rollout.from_bytes(record)


class TestStore:
    def test_what_was_written_is_read_in_the_plans_order(self, tmp_path):
        opened = create(tmp_path / "new" / "rollouts")
        assert opened.missing() == [0, 1, 2]
        assert len(opened) == 0
        for number in (2, 0, 1):
            assert not opened.complete
            opened.write(number, shard(number))
        assert opened.complete

        expected = [rollout for number in range(3) for rollout in shard(number)]
        for other in (opened, RolloutStore.open(opened.folder), create(opened.folder)):
            other.verify()
            assert other.complete
            assert len(other) == 15
            for found, rollout in zip(other.all(), expected, strict=True):
                assert_same(found, rollout)
        with pytest.raises(IndexError):
            opened[15]
        with pytest.raises(IndexError):
            opened[-1]

    def test_manifest_counts(self, tmp_path):
        fill(create(tmp_path))
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest["schema"] == 1
        assert manifest["config_hash"] == "hash"
        tokens = 5 * (3 + 4 + 5)
        assert manifest["written"] == {"shards": 3, "prompts": 5, "rollouts": 15, "tokens": tokens}
        assert [entry["prompts"] for entry in manifest["shards"]] == PLAN
        for entry in manifest["shards"]:
            assert entry["bytes"] == (tmp_path / entry["file"]).stat().st_size

    def test_is_a_source_for_grain_also_when_pickled(self, tmp_path):
        opened = fill(create(tmp_path))
        assert len(opened.all()) == 15  # has open readers by now
        for source in (opened, pickle.loads(pickle.dumps(opened))):
            data = grain.MapDataset.source(source).seed(0).shuffle()
            found = sorted((r.prompt.id, r.candidate) for r in data)
            assert found == [(id, candidate) for id in "abcde" for candidate in range(3)]

    def test_writing_again_gives_the_same_files(self, tmp_path):
        fill(create(tmp_path / "1"))
        fill(create(tmp_path / "2"))
        assert contents(tmp_path / "1") == contents(tmp_path / "2")

    def test_a_store_of_another_run_is_refused_and_left_alone(self, tmp_path):
        fill(create(tmp_path))
        before = contents(tmp_path)
        with pytest.raises(RolloutError, match=r"another config.*Expected: other. Got: hash"):
            create(tmp_path, config_hash="other")
        with pytest.raises(RolloutError, match="other prompts"):
            create(tmp_path, plan=PLAN[::-1])
        assert contents(tmp_path) == before

    @pytest.mark.parametrize("plan", [[], [[]], [["a"], []], [["a"], ["b", "a"]]])
    def test_impossible_plans(self, tmp_path, plan):
        with pytest.raises(ValueError, match="plan"):
            create(tmp_path, plan=plan)

    def test_a_shard_holds_what_was_planned_and_is_written_once(self, tmp_path):
        opened = create(tmp_path)
        for wrong in (shard(1), shard(0)[:3], shard(0)[::-1], []):
            with pytest.raises(ValueError, match=r"Shard 0.*Got: "):
                opened.write(0, wrong)
        with pytest.raises(ValueError, match="twice"):
            opened.write(0, [*shard(0), sample("b", 1)])
        opened.write(0, shard(0))
        with pytest.raises(RolloutError, match="already"):
            opened.write(0, shard(0))

    @pytest.mark.parametrize(
        "text", [None, "", "{", "[]", '{"schema": 2}', '{"schema": 1, "config_hash": "x"}']
    )
    def test_a_manifest_that_cannot_be_read(self, tmp_path, text):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(RolloutError, match=r"manifest\.json.*Got: "):
            RolloutStore.open(tmp_path)


class TestDamage:
    def damage(self, folder, how):
        path = sorted(folder.glob("*.arrayrecord"))[1]
        content = bytearray(path.read_bytes())
        if how == "flipped":
            content[len(content) // 3] ^= 1
        elif how == "truncated":
            content = content[: len(content) // 2]
        elif how == "emptied":
            content = bytearray()
        path.write_bytes(content)
        if how == "deleted":
            path.unlink()
        return path

    @pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "deleted"])
    def test_is_named_with_the_way_out_and_harms_nothing_else(self, tmp_path, how):
        fill(create(tmp_path))
        original = contents(tmp_path)
        path = self.damage(tmp_path, how)
        damaged = contents(tmp_path)
        with pytest.raises(RolloutError, match=rf"{path.name} is .*run again.*sampled again"):
            RolloutStore.open(tmp_path).verify()
        assert contents(tmp_path) == damaged

        path.unlink(missing_ok=True)
        opened = create(tmp_path)
        opened.verify()
        assert opened.missing() == [1]
        assert [r.prompt.id for r in opened.all()[::3]] == ["a", "b", "d", "e"]
        fill(opened)
        assert contents(tmp_path) == original

    @pytest.mark.parametrize("how", ["truncated", "emptied", "deleted"])
    def test_is_met_on_reading_too(self, tmp_path, how):
        opened = fill(create(tmp_path))
        path = self.damage(tmp_path, how)
        assert opened[0].prompt.id == "a"
        assert opened[14].prompt.id == "e"
        with pytest.raises(RolloutError, match=rf"{path.name} is damaged"):
            opened[6]

    def test_a_flipped_record_is_met_on_reading(self, tmp_path):
        opened = fill(create(tmp_path))
        path = sorted(tmp_path.glob("*.arrayrecord"))[1]
        content = path.read_bytes()
        for place in np.flatnonzero(np.frombuffer(content, np.uint8))[::40]:
            flipped = bytearray(content)
            flipped[place] ^= 4
            path.write_bytes(flipped)
            opened = RolloutStore.open(tmp_path)
            try:
                found = [opened[index] for index in (6, 7, 8)]
            except RolloutError:
                continue
            for rollout, expected in zip(found, shard(1), strict=True):
                assert_same(rollout, expected)


class TestFailedWrites:
    """Whatever call of the system fails, what was stored before stays, and writing can go on."""

    @pytest.mark.parametrize("name", ["fsync", "replace"])
    @pytest.mark.parametrize("call", [0, 1, 2, 3])
    def test_at_every_step(self, tmp_path, monkeypatch, name, call):
        reference = contents(fill(create(tmp_path / "whole")).folder)
        opened = create(tmp_path / "rollouts")
        opened.write(0, shard(0))
        real, calls = getattr(os, name), []

        def fail(*args, **kwargs):
            calls.append(args)
            if len(calls) == call + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, fail)
            if call < {"fsync": 4, "replace": 2}[name]:
                with pytest.raises(RolloutError, match=r"rollouts; .*intact.*No space") as caught:
                    opened.write(1, shard(1))
                assert isinstance(caught.value.__cause__, OSError)
            else:
                opened.write(1, shard(1))
        assert not list(opened.folder.glob(".*"))
        for other in (opened, RolloutStore.open(opened.folder)):
            other.verify()
            assert 0 not in other.missing()
            assert_same(other[0], shard(0)[0])
        # The same store, or the next process, finishes.
        fill(opened if call % 2 else create(opened.folder))
        assert contents(opened.folder) == reference

    def test_a_file_that_cannot_grow(self, tmp_path):
        """As on a full disk, the writer of ArrayRecord itself fails."""
        opened = create(tmp_path)
        opened.write(0, shard(0))
        before = contents(tmp_path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, hard))
        try:
            with pytest.raises(RolloutError, match=r"could not be stored.*too large"):
                opened.write(1, shard(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert contents(tmp_path) == before
        fill(opened).verify()
        assert opened.complete

    def test_records_that_vanish_silently(self, tmp_path, monkeypatch):
        class Forgetful(store.ArrayRecordWriter):
            def write(self, record):
                pass

        opened = create(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(store, "ArrayRecordWriter", Forgetful)
            with pytest.raises(RolloutError, match="0 of 6 records"):
                opened.write(0, shard(0))
        assert opened.missing() == [0, 1, 2]

    def test_a_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RolloutError, match="file"):
            create(tmp_path / "file")


KILLS = """
import os, pathlib, signal, sys
from iro_jax import files
from iro_jax.data import store
from tests.data.test_store import contents, create, sample

PLAN = [["a"], ["b"]]
root = pathlib.Path(sys.argv[1])

def run(folder, call=None):
    '''In a child: fills the store; kills itself at that call of the system or of the writer.'''
    child = os.fork()
    if child == 0:
        count = 0
        def deadly(function):
            def called(*args, **kwargs):
                nonlocal count
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return called
        class Writer(store.ArrayRecordWriter):
            write = deadly(store.ArrayRecordWriter.write)
            close = deadly(store.ArrayRecordWriter.close)
        store.ArrayRecordWriter = Writer
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        opened = create(folder, plan=PLAN)
        for number in opened.missing():
            opened.write(number, [sample(id, 0) for id in PLAN[number]])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return status != 0

run(root / "whole")
expected = contents(root / "whole")
call = leftovers = 0
killed = True
while killed:
    call += 1
    folder = root / str(call)
    killed = run(folder, call)
    leftovers += len(list(folder.glob(".*")))
    if call % 3 == 0:
        run(folder, call - 1)  # and once more while it recovers
    create(folder, plan=PLAN).verify()
    assert not run(folder)
    assert contents(folder) == expected
assert leftovers >= 5, leftovers
print(call - 1)
"""


def test_killed_at_every_call_it_ends_in_the_same_files(tmp_path):
    """SIGKILL before every record, flush and rename of a store; then again; then to the end."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    flushes_and_rename = 3  # of a file: its content, the rename, its folder
    record_and_close = 2
    shards = 2
    assert int(done.stdout) == flushes_and_rename + shards * (
        record_and_close + 2 * flushes_and_rename
    )
