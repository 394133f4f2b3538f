"""Rows of JSON lines, CSV and datasets, each with the place that an error would name.

What the rows mean is the business of `prompts.py`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class PromptError(ValueError):
    """A source of prompts cannot be read; the message names the source and the line or row."""


Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Rows of a source, each with its place as an error names it."""


def rows(source: str, split: str) -> Rows:
    """The rows of a source that `read_prompts` knows, one by one.

    Raises:
      PromptError: as `read_prompts` has it.
      ImportError: the package that the source needs is not installed; names the extra.
    """
    if source.startswith("hf:"):
        return _dataset_rows(source, _open_huggingface, split)
    if source.startswith("tfds:"):
        return _dataset_rows(source, _open_tfds, split)
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    reader = readers.get(Path(source).suffix.lower())
    if reader is None:
        raise PromptError(
            "A source of prompts must end in .jsonl or .csv, or begin with hf: or tfds:. "
            f"Got: {source!r}"
        )
    if not Path(source).is_file():
        raise PromptError(f"{source}: expected a file with prompts. Got: no such file")
    return reader(Path(source))


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends, decoded one by one so that a bad byte has a line number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PromptError(
                    f"{path}, line {number}: expected UTF-8. "
                    f"Got: byte {error.object[error.start]:#04x} at column {error.start + 1}"
                ) from error


def _jsonl_rows(path: Path) -> Rows:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise PromptError(
                f"{place}: expected a JSON object ({error}). Got: {shorten(line.rstrip())}"
            ) from error
        if not isinstance(row, dict):
            raise PromptError(f"{place}: expected a JSON object. Got: {shorten(row)}")
        yield place, row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _csv_rows(path: Path) -> Rows:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    first = 1
    while True:
        place = f"{path}, line {first}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise PromptError(f"{place}: expected a row of CSV. Got: {error}") from error
        if row is None:
            return
        first = reader.line_num + 1
        if not row:
            continue
        if header is None:
            header = row
            if len(set(header)) != len(header):
                raise PromptError(f"{place}: expected different column names. Got: {header}")
        elif len(row) != len(header):
            raise PromptError(
                f"{place}: expected {len(header)} fields, as in the header. Got: {len(row)}"
            )
        else:
            yield place, dict(zip(header, row, strict=True))


def _dataset_rows(source: str, open_dataset: Callable[[str, str], Any], split: str) -> Rows:
    dataset = open_dataset(source, split)
    for index in range(len(dataset)):
        place = f"{source}, split {split!r}, row {index}"
        try:
            row = _plain(dataset[index])
        except UnicodeDecodeError as error:
            raise PromptError(f"{place}: expected UTF-8. Got: {error}") from error
        yield place, row


def _plain(value: Any) -> Any:
    """Bytes as text and arrays as lists: what JSON would have."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _open_huggingface(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Prompts from Hugging Face datasets need the package `datasets`: "
            f"pip install 'iro_jax[hf]'. Got: {error}"
        ) from error
    name = source.removeprefix("hf:")
    folder = Path(name)
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return _split(source, datasets.load_from_disk(name), split)
        if folder.is_dir():
            return datasets.load_dataset(name, split=split)
        name, _, config = name.partition(":")
        return datasets.load_dataset(name, config or None, split=split)
    except (ValueError, OSError) as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(
            f"{source}: expected a folder or a dataset of the hub with a split {split!r}. "
            f"Got: {error}"
        ) from error


def _split(source: str, saved: Any, split: str) -> Any:
    """What was saved may be one split, or all of them by name."""
    if not isinstance(saved, Mapping):
        return saved
    if split not in saved:
        raise PromptError(f"{source}: expected one of the splits {sorted(saved)}. Got: {split!r}")
    return saved[split]


def _open_tfds(source: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    name = source.removeprefix("tfds:")
    try:
        if Path(name).is_dir():
            return tfds.builder_from_directory(name).as_data_source(split=split)
        return tfds.data_source(name, split=split)
    except (ValueError, OSError, NotImplementedError, tfds.core.DatasetNotFoundError) as error:
        # The first line; below it, tensorflow-datasets lists all that it has.
        raise PromptError(
            f"{source}: expected a dataset of tensorflow-datasets, stored as ArrayRecord, with a "
            f"split {split!r}. Got: {str(error).partition(chr(10))[0]}"
        ) from error


def shorten(value: Any) -> str:
    """The value as an error shows it, on one line."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
