"""Every answer is scored once, in this process and in the next."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from iro_jax.data import Prompt
from iro_jax.rewards import CachedReward, TextAnswer


class Asked:
    """A reward that remembers what it was asked for."""

    def __init__(self, offset=0.1):
        self.calls, self.offset = [], offset

    def __call__(self, prompts, answers):
        self.calls.append([(p.id, a.text) for p, a in zip(prompts, answers, strict=True)])
        return np.float32([len(a.text) + self.offset for a in answers])


PROMPTS = [Prompt(f"p{i}", "x") for i in range(6)]
ANSWERS = [TextAnswer("a" * i) for i in range(6)]


def test_duplicates_are_asked_for_once():
    asked = Asked()
    reward = CachedReward(asked)
    prompts = [PROMPTS[i] for i in (0, 1, 0, 1, 2)]
    answers = [ANSWERS[i] for i in (0, 1, 0, 2, 1)]
    expected = np.float32([0.1, 1.1, 0.1, 2.1, 1.1])
    np.testing.assert_array_equal(reward(prompts, answers), expected)
    assert asked.calls == [[("p0", ""), ("p1", "a"), ("p1", "aa"), ("p2", "a")]]
    np.testing.assert_array_equal(reward(prompts[::-1], answers[::-1]), expected[::-1])
    assert len(asked.calls) == 1
    assert reward.num_queries == 4


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (Prompt("other", "x", 1), TextAnswer("t")),
        (Prompt("p", "y", 1), TextAnswer("t")),
        (Prompt("p", [{"role": "user", "content": "x"}], 1), TextAnswer("t")),
        (Prompt("p", "x", 2), TextAnswer("t")),
        (Prompt("p", "x", 1), TextAnswer("u")),
        (Prompt("p", "x", 1), TextAnswer("t", tokens=(1,))),
        (Prompt("p", "x", 1), TextAnswer("t", finished=False)),
    ],
)
def test_what_makes_an_answer_another_one(prompt, answer):
    asked = Asked()
    reward = CachedReward(asked)
    reward([Prompt("p", "x", 1)], [TextAnswer("t")])
    reward([Prompt("p", "x", 1)], [TextAnswer("t")])
    assert reward.num_queries == 1
    reward([prompt], [answer])
    assert reward.num_queries == 2


def test_the_next_process_asks_for_nothing(tmp_path):
    path = tmp_path / "folder" / "cache.jsonl"
    first = CachedReward(Asked(), path)(PROMPTS, ANSWERS)
    again = CachedReward(None, path)
    np.testing.assert_array_equal(again(PROMPTS, ANSWERS), first)
    assert first.dtype == np.float32


def test_another_name_is_another_reward(tmp_path):
    path = tmp_path / "cache.jsonl"
    CachedReward(Asked(0.1), path, name="first")(PROMPTS, ANSWERS)
    second = CachedReward(Asked(0.2), path, name="second")(PROMPTS, ANSWERS)
    np.testing.assert_array_equal(second, np.arange(6, dtype=np.float32) + np.float32(0.2))
    assert len(path.read_text().splitlines()) == 12


def test_a_batch_is_stored_before_the_next_is_asked_for(tmp_path):
    path = tmp_path / "cache.jsonl"
    asked = Asked()

    def fails_in_the_end(prompts, answers):
        if prompts[0].id == "p4":
            raise RuntimeError("the server is gone")
        return asked(prompts, answers)

    with pytest.raises(RuntimeError, match="gone"):
        CachedReward(fails_in_the_end, path, batch_size=2)(PROMPTS, ANSWERS)
    assert [len(call) for call in asked.calls] == [2, 2]
    second = Asked()
    CachedReward(second, path)(PROMPTS, ANSWERS)
    assert second.calls == [[("p4", "aaaa"), ("p5", "aaaaa")]]


def test_a_file_torn_at_any_byte_loses_only_the_torn_line(tmp_path):
    path = tmp_path / "cache.jsonl"
    want = CachedReward(Asked(), path)(PROMPTS[:3], ANSWERS[:3])
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        reward = CachedReward(Asked(), path)
        np.testing.assert_array_equal(reward(PROMPTS[:3], ANSWERS[:3]), want)
        assert reward.num_queries == 3 - whole[:size].count(b"\n")
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "cache.jsonl"
    CachedReward(Asked(), path)(PROMPTS, ANSWERS)
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (b"\n", b'{"key": "x"}\n', b'{"key": "x", "reward": "high"}\n', b"[1]\n"):
        content = b"".join([*lines[:2], broken, *lines[3:]])
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cache\.jsonl, line 3: expected a key"):
            CachedReward(Asked(), path)
        assert path.read_bytes() == content


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "cache.jsonl"
    reward = CachedReward(Asked(), path)
    reward(PROMPTS[:2], ANSWERS[:2])
    before = path.read_bytes()
    write = io.FileIO.write

    class Full(io.FileIO):
        """Holds one more line and half of another."""

        room = len(before) // 2 + 40

        def write(self, data):
            taken = data[: self.room]
            self.room -= len(taken)
            return write(self, taken)

    monkeypatch.setattr("pathlib.Path.open", lambda self, mode, **options: Full(self, mode))
    with pytest.raises(OSError, match="the disk is full"):
        reward(PROMPTS, ANSWERS)
    monkeypatch.undo()
    assert path.read_bytes() == before
    np.testing.assert_array_equal(reward(PROMPTS, ANSWERS), Asked()(PROMPTS, ANSWERS))


def test_what_is_not_finite_is_not_stored(tmp_path):
    path = tmp_path / "cache.jsonl"
    with pytest.raises(ValueError, match="prompt 'p0'"):
        CachedReward(lambda prompts, answers: [np.nan], path)(PROMPTS[:1], ANSWERS[:1])
    assert path.read_bytes() == b""


def test_a_killed_process_keeps_what_it_has_written(tmp_path):
    path = tmp_path / "cache.jsonl"
    program = textwrap.dedent(
        """
        import sys
        from iro_jax.data import Prompt
        from iro_jax.rewards import CachedReward, TextAnswer

        reward = CachedReward(lambda prompts, answers: [0.1] * len(answers), sys.argv[1])
        for i in range(10**9):
            reward([Prompt(str(i), "x")], [TextAnswer("t")])
            if i == 20:
                print("ready", flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, path],
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reward = CachedReward(Asked(), path)
    prompts = [Prompt(str(i), "x") for i in range(21)]
    np.testing.assert_array_equal(reward(prompts, [TextAnswer("t")] * 21), [np.float32(0.1)] * 21)
    assert reward.num_queries == 0
    assert all(json.loads(line) for line in path.read_text().splitlines())
