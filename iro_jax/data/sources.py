"""Rows of JSON lines, CSV and datasets, each with the place that an error would name.

What the rows mean is the business of `prompts.py`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub import errors as hub_errors

_HUB_FILE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+\.(jsonl|json|csv))")


class PromptError(ValueError):
    """A source of prompts cannot be read; the message names the source and the line or row."""


class MissingSourceError(PromptError):
    """There is nothing to read: no such file, or a dataset that the hub did not give."""


Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Rows of a source, each with its place as an error names it."""


def rows(source: str, split: str, fields: Sequence[str] | None = None) -> Rows:
    """The rows of a source that `read_prompts` knows, one by one.

    Args:
      fields: those that are needed; reading a dataset's others may take most of the time.

    Raises:
      PromptError: as `read_prompts` has it.
      ImportError: the package that the source needs is not installed; names the extra.
    """
    if source.startswith("hf:"):
        match = _HUB_FILE.fullmatch(source)
        if match is not None and not Path(source.removeprefix("hf:")).exists():
            return _file_rows(_hub_file(source, match["repo"], match["file"]))
        return _dataset_rows(source, _open_huggingface, split, fields)
    if source.startswith("tfds:"):
        return _dataset_rows(source, _open_tfds, split, fields)
    if Path(source).suffix.lower() not in _READERS:
        raise PromptError(
            f"A source of prompts must end in {', '.join(_READERS)}, or begin with hf: or tfds:. "
            f"Got: {source!r}"
        )
    if not Path(source).is_file():
        raise MissingSourceError(f"{source}: expected a file with prompts. Got: no such file")
    return _file_rows(Path(source))


def _file_rows(path: Path) -> Rows:
    return _READERS[path.suffix.lower()](path)


def _hub_file(source: str, repo: str, file: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset"))
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise MissingSourceError(
            f"{source}: the hub did not give the file {file} of the dataset {repo}."
            f" Got: {type(error).__name__}: {_first_line(error)}"
        ) from error


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


def _json_rows(path: Path) -> Rows:
    """A list of objects: one JSON value, so that there are no lines to name."""
    try:
        found = json.loads("".join(_lines(path)), parse_constant=_refuse_constant)
    except ValueError as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"{path}: expected a list of JSON objects. Got: {error}") from error
    if not isinstance(found, list):
        raise PromptError(f"{path}: expected a list of JSON objects. Got: {shorten(found)}")
    for index, row in enumerate(found):
        place = f"{path}, object {index}"
        if not isinstance(row, dict):
            raise PromptError(f"{place}: expected a JSON object. Got: {shorten(row)}")
        yield place, row


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


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}


def _dataset_rows(
    source: str,
    open_dataset: Callable[[str, str], Any],
    split: str,
    fields: Sequence[str] | None,
) -> Rows:
    dataset = open_dataset(source, split)
    columns = getattr(dataset, "column_names", None)
    if fields is not None and columns is not None and set(fields) <= set(columns):
        dataset = dataset.select_columns(list(fields))
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
        raise MissingSourceError(
            f"{source}: expected a folder or a dataset of the hub with a split {split!r}, whose"
            f" Parquet files are read. Got: {_first_line(error)}"
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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def shorten(value: Any) -> str:
    """The value as an error shows it, on one line."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
