"""Checkpoint folders in Hugging Face layout: `config.json` beside safetensors."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from iro_jax.files import sync
from iro_jax.models.weights.checkpoint import CheckpointError, id_set, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class SafetensorsFolder:
    """A `Checkpoint` read from safetensors; every header is checked on opening.

    Raises:
      CheckpointError: a file is missing, truncated or not what the index says.
    """

    def __init__(self, folder: Path):
        self.origin = folder
        self.hf_config = read_json(folder / "config.json")
        self._files = _weight_files(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for path in sorted(set(self._files.values())):
            for name, shape, dtype in _header(path):
                if self._files.setdefault(name, path) == path:
                    shapes[name] = shape
                    dtypes[name] = dtype
        absent = sorted(set(self._files) - set(shapes))
        if absent:
            raise CheckpointError(
                f"{self._files[absent[0]]}: {INDEX_FILE} promises tensor {absent[0]!r} here,"
                " but the file does not hold it"
            )
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.dtypes: Mapping[str, str] = dtypes

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        # Opened anew for each read: pages of a memory map count as resident until closed.
        with safetensors.safe_open(self._files[name], framework="numpy") as file:
            return file.get_slice(name)[index]

    def location(self, name: str) -> Path:
        return self._files.get(name, self.origin)

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        path = self.origin / "generation_config.json"
        generation = read_json(path) if path.exists() else {}
        return id_set(generation.get("eos_token_id", self.hf_config.get("eos_token_id")))

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        if not any((self.origin / name).exists() for name in _TOKENIZER_FILES):
            return None
        # Imports PyTorch where it is installed, which takes seconds.
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.origin, local_files_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.origin}: the tokenizer does not load ({error})"
            ) from error


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor that the index lists, or of all tensors in the single file."""
    index = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if single.exists():
        return {name: single for name, _, _ in _header(single)}
    if not index.exists():
        pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
        found = f", only {', '.join(sorted(pickles))}, which is never read" if pickles else ""
        raise CheckpointError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}{found}")
    weight_map = read_json(index).get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not named or not weight_map:
        raise CheckpointError(f"{index}: weight_map must give the file of every tensor")
    files = {name: folder / file for name, file in weight_map.items()}
    for name, path in files.items():
        if not path.exists():
            raise CheckpointError(f"{path}: missing shard (it holds {name!r}, says {INDEX_FILE})")
    return files


def _header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every tensor in a file, whose length is checked."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118
            return [(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices]
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not safetensors ({error})") from error


def write_folder(
    folder: Path,
    hf_config: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes a folder that `transformers` opens; it appears whole or not at all.

    Args:
      folder: must not exist, or be an empty folder.
      hf_config: becomes `config.json`.
      tensors: names and arrays, consumed one shard at a time.
      tokenizer: saved beside the weights.
      generation_config: becomes `generation_config.json`.
      extra_files: further files by name.
      shard_bytes: a file is closed before it would grow past this.

    Raises:
      FileExistsError: there is something at `folder` already.
    """
    with staged_folder(folder) as staging:
        _write_shards(staging, tensors, shard_bytes)
        _write_json(staging / "config.json", hf_config)
        if generation_config is not None:
            _write_json(staging / "generation_config.json", generation_config)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        for name, content in (extra_files or {}).items():
            (staging / name).write_bytes(content)


@contextlib.contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its place at the end, whole, or not at all.

    Raises:
      FileExistsError: there is something at `folder` already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: already exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        # The content is on the disk before the name is, and a power cut leaves both or neither.
        for path in (*staging.rglob("*"), staging):
            sync(path)
        os.replace(staging, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    weight_map: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    paths: list[Path] = []
    total = 0

    def flush():
        paths.append(folder / f"shard-{len(paths)}")
        safetensors.numpy.save_file(shard, paths[-1], metadata={"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(x.nbytes for x in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        weight_map[name] = len(paths)
        total += tensor.nbytes
    flush()

    if len(paths) == 1:
        paths[0].rename(folder / SINGLE_FILE)
        return
    names = [f"model-{i + 1:05d}-of-{len(paths):05d}.safetensors" for i in range(len(paths))]
    for path, name in zip(paths, names, strict=True):
        path.rename(folder / name)
    files = {name: names[shard_index] for name, shard_index in weight_map.items()}
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": files})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
