"""Files that are either as they were or as they should be, whenever the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIX = ".unfinished"


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that no moment, and no power cut, leaves half of it.

    Text is written as UTF-8.

    Raises:
      OSError: the disk is full, or the folder is missing or not writable; the file is as it
        was before.
    """
    path = Path(path)
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written and is as it was before. Got: {error.strerror}",
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to; it replaces `path` when the block ends.

    The content is on the disk before the name is, and both are when the block has ended. If
    the block raises, `path` is as it was before. A killed process leaves the other file
    behind, for `remove_unfinished`.
    """
    unfinished = path.with_name(f".{path.name}{_SUFFIX}")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: str | Path) -> None:
    """Removes what killed writes left in the folder; call it where nothing else writes."""
    for path in Path(folder).glob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)


def read_json(path: str | Path, error: type[Exception] = ValueError) -> Any:
    """The JSON value in a file.

    Args:
      path: of the file, UTF-8.
      error: the class to raise; its message names the file.

    Raises:
      error: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise error(f"{path}: expected a file with JSON. Got: {cause}") from cause


def sync(path: Path) -> None:
    """Puts a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
