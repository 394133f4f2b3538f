"""Atomic files: the old content or the new one, never a part."""

import errno
import os

import pytest

from iro_jax import files
from iro_jax.files import read_json, remove_unfinished, write_atomic


def test_text_and_bytes(tmp_path):
    write_atomic(tmp_path / "a", "ü\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xbc\n"
    write_atomic(tmp_path / "a", b"\x00")
    assert (tmp_path / "a").read_bytes() == b"\x00"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content(tmp_path, monkeypatch, name):
    write_atomic(tmp_path / "a", "old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, name, full)
    with pytest.raises(OSError, match=r"a could not be written.*No space") as caught:
        write_atomic(tmp_path / "a", "new")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomic(tmp_path / "nowhere" / "a", "x")


def test_only_what_killed_writes_left_is_removed(tmp_path):
    for name in ("a", ".hidden", ".a.unfinished", "b.unfinished"):
        (tmp_path / name).write_text("x")
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a", "b.unfinished"]


def test_reading_json(tmp_path):
    write_atomic(tmp_path / "a", '{"x": "ü"}')
    assert read_json(tmp_path / "a") == {"x": "ü"}
    for name, content in (("b", "{"), ("c", b"\xff")):
        write_atomic(tmp_path / name, content)
        with pytest.raises(KeyError, match=rf"{name}: expected.*Got: "):
            read_json(tmp_path / name, KeyError)
    with pytest.raises(KeyError, match="missing"):
        read_json(tmp_path / "missing", KeyError)
