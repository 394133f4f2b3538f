"""A run's folder: its configuration, and which stages are done.

    config.json     what the run was started with; another configuration is refused
    manifest.json   the stages that are done, in order, with what they found

A stage writes its results first and is entered here last, so that a killed run repeats at
most one stage, of which everything that it had stored is still there. Where several hosts run
together, the first one writes both files, and no host goes on before they are written.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iro_jax import hosts
from iro_jax.files import read_json, remove_unfinished, write_atomic

SCHEMA = 1
_CONFIG, _MANIFEST = "config.json", "manifest.json"


class WorkdirError(RuntimeError):
    """The folder belongs to another run, is damaged, or cannot be written to."""


class Workdir:
    """A run's folder.

    Args:
      folder: made if it does not exist.
      config: everything that the run's results depend on, as JSON values.

    Raises:
      WorkdirError: the folder holds the work of another configuration (the fields are named),
        its manifest is damaged, or it cannot be written to.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]):
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config, sort_keys=True))
        self._together = True
        if hosts.first():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_unfinished(self.folder)
                self._check_config()
            except OSError as error:
                raise WorkdirError(f"{self.folder} cannot be written to. Got: {error}") from error
        hosts.meet("workdir")
        if not hosts.first():
            self._check_shared()
        self._stages: dict[str, Any] = self._read_stages()

    @property
    def config_hash(self) -> str:
        text = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def run_id(self) -> str:
        """A name for this run that another folder or configuration does not have."""
        place = hashlib.sha256(f"{self.folder.resolve()}\n{self.config_hash}".encode())
        return f"{self.folder.name}-{place.hexdigest()[:12]}"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def done(self, stage: str) -> bool:
        return stage in self._stages

    def result(self, stage: str) -> Any:
        """What `finish` was told about a stage that is done."""
        return self._stages[stage]

    def alone(self) -> Workdir:
        """The same folder for what the first host does while the others do not wait."""
        own = copy.copy(self)
        own._together = False
        return own

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that are done, in the order in which they ended."""
        return tuple(self._stages)

    def finish(self, stage: str, result: Any = None) -> Any:
        """Enters a stage as done, with a JSON value that describes what it found.

        Raises:
          WorkdirError: the disk is full or the folder not writable.
        """
        if hosts.first():
            self._enter(self._stages | {stage: result}, stage)
        if self._together:
            hosts.meet(f"stage {stage}")
        # As it will be read again.
        self._stages = self._read_stages()
        return self._stages[stage]

    def _enter(self, stages: Mapping[str, Any], stage: str) -> None:
        content = {"schema": SCHEMA, "config_hash": self.config_hash, "stages": stages}
        text = json.dumps(content, indent=1) + "\n"
        try:
            write_atomic(self.folder / _MANIFEST, text)
        except OSError as error:
            raise WorkdirError(
                f"Stage {stage!r} could not be entered in {self.folder / _MANIFEST}; what it"
                f" stored is intact. Free some space and run again. Got: {error}"
            ) from error

    def _check_shared(self) -> None:
        """Of the other hosts: that they see the first one's folder."""
        path = self.folder / _CONFIG
        if not path.exists():
            raise WorkdirError(
                f"{self.folder} must be a folder that all hosts share. Got: no {_CONFIG} of the"
                f" first host's, on host {hosts.index()}"
            )
        if read_json(path, WorkdirError) != self.config:
            raise WorkdirError(
                f"{path} must be the same configuration on all hosts. Got: another one on host"
                f" {hosts.index()}"
            )

    def _check_config(self) -> None:
        path = self.folder / _CONFIG
        if not path.exists():
            if any(self.folder.iterdir()):
                raise WorkdirError(
                    f"{self.folder} must be empty or hold a run. Got: files, but no {_CONFIG}"
                )
            write_atomic(path, json.dumps(self.config, indent=1) + "\n")
            return
        stored = read_json(path, WorkdirError)
        if stored != self.config and self._untouched():
            write_atomic(path, json.dumps(self.config, indent=1) + "\n")
        elif stored != self.config:
            fields = ", ".join(_differences(stored, self.config)) or "its type"
            raise WorkdirError(
                f"{self.folder} holds a run with another configuration: use another workdir, or"
                f" delete it. Different: {fields}"
            )

    def _untouched(self) -> bool:
        """Whether no stage has stored anything, as after a mistake in the first command."""
        return {entry.name for entry in self.folder.iterdir()} <= {_CONFIG, "tensorboard"}

    def _read_stages(self) -> dict[str, Any]:
        path = self.folder / _MANIFEST
        if not path.exists():
            return {}
        manifest = read_json(path, WorkdirError)
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            raise WorkdirError(f"{path}: expected a manifest of schema {SCHEMA}. Got: another one")
        return dict(manifest["stages"])


def _differences(stored: Any, wanted: Any, prefix: str = "") -> list[str]:
    """Fields that differ, as `section.field (was 1, is 2)`."""
    if not (isinstance(stored, dict) and isinstance(wanted, dict)):
        return [] if stored == wanted else [f"{prefix} (was {stored!r}, is {wanted!r})"]
    found = []
    for name in sorted(set(stored) | set(wanted)):
        place = f"{prefix}.{name}" if prefix else name
        found += _differences(stored.get(name), wanted.get(name), place)
    return found
