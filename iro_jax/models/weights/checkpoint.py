"""What every source of weights offers: a configuration, tensors by name, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the field."""


class Checkpoint(Protocol):
    """A checkpoint on disk, under Hugging Face's names for its tensors.

    Attributes:
      origin: the folder or file, for messages.
      hf_config: the content of a `config.json`.
      shapes: every tensor's shape.
      dtypes: every tensor's type, as the format names it.
    """

    origin: Path
    hf_config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A rectangular part of a tensor; one slice per axis, step 1. Touches no more."""
        ...

    def location(self, name: str) -> Path:
        """The file that holds (or should hold) a tensor."""
        ...

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's tokenizer, or None if it comes without one."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      CheckpointError: the file is missing or broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file not found") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object. Got: {type(content).__name__}")
    return content


def id_set(*candidates: Any) -> tuple[int, ...]:
    """Token ids from configuration fields that hold None, an id or a list of ids."""
    found: set[int] = set()
    for candidate in candidates:
        if isinstance(candidate, int):
            found.add(candidate)
        elif candidate is not None:
            found.update(candidate)
    return tuple(sorted(found))
