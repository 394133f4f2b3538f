"""Configurations with the defaults and the present names that `transformers` knows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers


def normal_config(model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a `config.json`, from those that are there.

    What `transformers` says is kept in `$XDG_CACHE_HOME/iro_jax/configs` (`~/.cache` by default)
    for the next start: asking it imports PyTorch where that is installed, which takes seconds.
    """
    try:
        question = json.dumps([transformers.__version__, model_type, fields], sort_keys=True)
    except TypeError:  # fields that no file can hold
        return _by_transformers(model_type, fields)
    name = f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = cache / "iro_jax" / "configs" / name
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    normal = _by_transformers(model_type, fields)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # At once, so that nobody ever reads half of it.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(normal, file)
        os.replace(file.name, path)
    return normal


def _by_transformers(model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    # As text, so that the first answer is the same as those that were kept.
    return json.loads(AutoConfig.for_model(model_type, **fields).to_json_string(use_diff=False))
