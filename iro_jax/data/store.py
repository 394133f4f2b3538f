"""Where rollouts are kept: shards of ArrayRecord and a manifest.

A `RolloutStore` is planned before anything is sampled: each shard has its prompts, so that a
killed run finds the shards it lacks and samples these again, the same. A shard is written
whole or not at all. Which rollouts a value function trains on is decided in `dataset.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from iro_jax.data.rollouts import SCHEMA, Rollout
from iro_jax.files import read_json, remove_unfinished, replacing, write_atomic

_MANIFEST = "manifest.json"
_GROUPED_SINGLY = "group_size:1"  # each record can be read without its neighbours


class RolloutError(RuntimeError):
    """Stored rollouts are damaged, belong to another run, or cannot be written."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard's entry in the manifest.

    Attributes:
      file: name in the store's folder.
      prompts: ids of the prompts whose rollouts it holds, in order.
      rollouts: number of records.
      tokens: of all its answers.
      bytes: size of the file.
      sha256: of the file; empty as long as the shard is not written.
    """

    file: str
    prompts: tuple[str, ...]
    rollouts: int = 0
    tokens: int = 0
    bytes: int = 0
    sha256: str = ""

    @property
    def written(self) -> bool:
        return bool(self.sha256)


class _Records(NamedTuple):
    """Which records of a file to read, as array_record's `FileInstruction` has it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RolloutStore:
    """The rollouts of one iteration on disk, and a data source for Grain.

    `len` and indexing run over the shards that are written, in the order of the plan. One
    process may write at a time, any number may read. Where several hosts fill a store, all of them
    write shards and the first one the manifest: see `write` and `adopt`. Stores can be pickled.
    """

    shards: tuple[Shard, ...]
    _source: Any

    def __init__(self, folder: Path, config_hash: str, shards: Sequence[Shard]):
        """Use `create` or `open`."""
        self.folder = folder
        self.config_hash = config_hash
        self._set_shards(shards)

    @classmethod
    def create(
        cls, folder: str | Path, *, config_hash: str, plan: Sequence[Sequence[str]]
    ) -> RolloutStore:
        """Opens a store for writing: a new one, or one that a killed run has begun.

        What killed writes have left behind is removed. A shard whose file somebody deleted is
        missing again.

        Args:
          folder: of the store; made if it does not exist.
          config_hash: of everything that the rollouts depend on.
          plan: prompt ids, by shard.

        Raises:
          RolloutError: the folder has rollouts of another config or plan, its manifest is
            damaged, or it cannot be written to.
          ValueError: the plan is empty, or a prompt comes twice.
        """
        folder = Path(folder)
        ids = [id for prompts in plan for id in prompts]
        if not plan or not all(plan) or len(set(ids)) != len(ids):
            raise ValueError(
                "A plan must have shards, each with prompts, and no prompt twice. "
                f"Got: {len(plan)} shards with {[len(prompts) for prompts in plan]} prompts, "
                f"{len(set(ids))} of them different"
            )
        if not (folder / _MANIFEST).exists():
            shards = [
                Shard(f"rollouts-{number:05d}-of-{len(plan):05d}.arrayrecord", tuple(prompts))
                for number, prompts in enumerate(plan)
            ]
            store = cls(folder, config_hash, shards)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                remove_unfinished(folder)
                store._write_manifest(shards)
            except OSError as error:
                raise _unwritable(folder, error) from error
            return store

        store = cls.open(folder)
        if store.config_hash != config_hash:
            raise RolloutError(
                f"{folder} has rollouts of another config; use another folder, or delete it. "
                f"Expected: {config_hash}. Got: {store.config_hash}"
            )
        if [shard.prompts for shard in store.shards] != [tuple(prompts) for prompts in plan]:
            raise RolloutError(
                f"{folder} has rollouts for other prompts; use another folder, or delete it. "
                f"Expected: {len(ids)} prompts in {len(plan)} shards. "
                f"Got: {sum(len(shard.prompts) for shard in store.shards)} prompts in "
                f"{len(store.shards)} shards, or the same in another order"
            )
        remove_unfinished(folder)
        store._set_shards(
            [
                shard if (folder / shard.file).exists() else Shard(shard.file, shard.prompts)
                for shard in store.shards
            ]
        )
        store.adopt()
        return store

    @classmethod
    def open(cls, folder: str | Path) -> RolloutStore:
        """Opens a store for reading; changes nothing on disk.

        Raises:
          RolloutError: there is no store, or its manifest is damaged or of another schema.
        """
        folder = Path(folder)
        path = folder / _MANIFEST
        manifest = read_json(path, RolloutError)
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise RolloutError(f"{path}: expected schema {SCHEMA}. Got: {schema!r}")
        try:
            shards = [
                Shard(**{**shard, "prompts": tuple(shard["prompts"])})
                for shard in manifest["shards"]
            ]
            return cls(folder, manifest["config_hash"], shards)
        except (KeyError, TypeError) as error:
            raise RolloutError(f"{path}: expected a manifest of rollouts. Got: {error}") from error

    @property
    def complete(self) -> bool:
        """Whether all planned shards are written."""
        return not self.missing()

    def missing(self) -> list[int]:
        """Numbers of the planned shards that are not written."""
        return [number for number, shard in enumerate(self.shards) if not shard.written]

    def write(self, number: int, rollouts: Sequence[Rollout], *, enter: bool = True) -> None:
        """Writes a shard; when it returns, the shard is on the disk and in the manifest.

        Args:
          number: of the shard in the plan.
          rollouts: of the shard's prompts, in the plan's order.
          enter: otherwise its entry is left beside it, for another process to `adopt`.

        Raises:
          RolloutError: the disk is full or the folder not writable; all that was stored is as
            it was before. Or the shard is written already.
          ValueError: the rollouts are not those of the shard's prompts.
        """
        shard = self.shards[number]
        if shard.written:
            raise RolloutError(f"{self.folder / shard.file} is written already. Got: it again")
        found = tuple(dict.fromkeys(rollout.prompt.id for rollout in rollouts))
        if found != shard.prompts:
            raise ValueError(
                f"Shard {number} is planned for the prompts {_shorten(shard.prompts)}, in this "
                f"order. Got: {_shorten(found)}"
            )
        if len({(rollout.prompt.id, rollout.candidate) for rollout in rollouts}) != len(rollouts):
            raise ValueError(f"Shard {number} must have a candidate once. Got: some twice")

        path = self.folder / shard.file
        try:
            with replacing(path) as unfinished:
                _write_records(unfinished, [rollout.to_bytes() for rollout in rollouts])
                size, checksum = unfinished.stat().st_size, _checksum(unfinished)
            shards = list(self.shards)
            shards[number] = dataclasses.replace(
                shard,
                rollouts=len(rollouts),
                tokens=sum(rollout.length for rollout in rollouts),
                bytes=size,
                sha256=checksum,
            )
            # Killed before these lines: the shard counts as missing, and is written again.
            if enter:
                self._write_manifest(shards)
            else:
                write_atomic(_beside(path), json.dumps(dataclasses.asdict(shards[number])))
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._set_shards(shards)

    def adopt(self) -> None:
        """Enters the shards into the manifest that other processes have written.

        Raises:
          RolloutError: the disk is full or the folder not writable.
        """
        shards = list(self.shards)
        entries = [_beside(self.folder / shard.file) for shard in shards]
        for number, entry in enumerate(entries):
            if entry.exists() and not shards[number].written:
                fields = read_json(entry, RolloutError)
                shards[number] = Shard(**fields | {"prompts": tuple(fields["prompts"])})
        try:
            if tuple(shards) != self.shards:
                self._write_manifest(shards)
            for entry in entries:
                entry.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._set_shards(shards)

    def verify(self) -> None:
        """Compares every written shard with its checksum.

        Raises:
          RolloutError: a file is gone or damaged; names it, and what to do. Nothing is changed.
        """
        for shard in self.shards:
            path = self.folder / shard.file
            if not shard.written:
                continue
            if not path.exists():
                raise RolloutError(
                    f"{path} is missing; run again, and its rollouts are sampled again. "
                    f"Expected: {shard.bytes} bytes. Got: no file"
                )
            if path.stat().st_size != shard.bytes:
                raise _damaged(path, f"{shard.bytes} bytes", f"{path.stat().st_size} bytes")
            if (checksum := _checksum(path)) != shard.sha256:
                raise _damaged(path, f"SHA-256 {shard.sha256}", checksum)

    def all(self) -> list[Rollout]:
        """All rollouts that are written, in the order of the plan."""
        return [self[index] for index in range(len(self))]

    def __len__(self) -> int:
        return sum(shard.rollouts for shard in self.shards)

    def __getitem__(self, index: int) -> Rollout:
        """Rollout `index` of those that are written.

        Raises:
          IndexError: there are not as many.
          RolloutError: its shard is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Expected an index between 0 and {len(self) - 1}. Got: {index}")
        if self._source is None:
            self._source = grain.sources.ArrayRecordDataSource(
                [
                    # With its number of records; otherwise an unreadable file has none.
                    _Records(str(self.folder / shard.file), 0, shard.rollouts, shard.rollouts)
                    for shard in self.shards
                    if shard.written
                ]
            )
        try:
            return Rollout.from_bytes(self._source[index])
        except Exception as error:  # ArrayRecord, MessagePack and JSON have each their own
            ends = np.cumsum([shard.rollouts for shard in self.shards])
            path = self.folder / self.shards[int(np.searchsorted(ends, index, "right"))].file
            raise _damaged(path, "a rollout", str(error)) from error

    def _set_shards(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._source = None  # opened when first read from

    def _write_manifest(self, shards: Sequence[Shard]) -> None:
        written = [shard for shard in shards if shard.written]
        manifest = {
            "schema": SCHEMA,
            "config_hash": self.config_hash,
            "written": {
                "shards": len(written),
                "prompts": sum(len(shard.prompts) for shard in written),
                "rollouts": sum(shard.rollouts for shard in written),
                "tokens": sum(shard.tokens for shard in written),
            },
            "shards": [dataclasses.asdict(shard) for shard in shards],
        }
        write_atomic(self.folder / _MANIFEST, json.dumps(manifest, indent=1))


def _write_records(path: Path, records: Sequence[bytes]) -> None:
    """Writes an ArrayRecord file; its writer tells of a full disk as late as when it closes."""
    try:
        writer = ArrayRecordWriter(str(path), _GROUPED_SINGLY)
        for record in records:
            writer.write(record)
        writer.close()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    reader = ArrayRecordReader(str(path))
    if reader.num_records() != len(records):
        raise OSError(f"{reader.num_records()} of {len(records)} records were written")
    reader.close()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    """Where a shard's entry waits to be adopted."""
    return path.with_suffix(".json")


def _damaged(path: Path, expected: str, got: str) -> RolloutError:
    return RolloutError(
        f"{path} is damaged; delete this file and run again, and its rollouts are sampled again. "
        f"Expected: {expected}. Got: {got}"
    )


def _unwritable(folder: Path, error: OSError) -> RolloutError:
    return RolloutError(
        f"Rollouts could not be stored in {folder}; what was stored there before is intact. "
        f"Free some space or make it writable, and run again. Got: {error}"
    )


def _shorten(ids: Sequence[str]) -> str:
    return f"{list(ids[:3])}{' and so on' if len(ids) > 3 else ''} ({len(ids)})"
