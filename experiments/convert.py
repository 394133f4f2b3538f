"""A folder of safetensors from a checkpoint that was published as a pickle.

    python -m experiments.convert --source=ORGANISATION/NAME@REVISION --target=FOLDER

The library reads safetensors alone. This command reads `pytorch_model.bin` with PyTorch, which
has to be installed, by its loader for weights only, which runs nothing that a file brings. Reward
models of the TL;DR checkpoints, a `lm_backbone` with a `scalar_head`, become sequence classifiers:
what their head adds to every reward goes into the bias of the last norm, so that rewards stay the
same up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from absl import app, flags

from experiments import command
from iro_jax.models import CheckpointError
from iro_jax.models.families import family_of
from iro_jax.models.weights import staged_folder

if TYPE_CHECKING:
    import torch

_SOURCE = flags.DEFINE_string("source", None, "A folder, or a hub name with or without @REVISION.")
_TARGET = flags.DEFINE_string("target", None, "The folder to write; it must not exist.")

_PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
_BESIDE = ("*.json", "tokenizer.model", "merges.txt", "vocab.txt")
Tensors = Mapping[str, "torch.Tensor"]


def convert(source: str, target: Path) -> None:
    """Writes `target`, which appears whole or not at all.

    Raises:
      CheckpointError: there is no pickle, or it is of no family that the library knows.
      FileExistsError: there is something at `target` already.
      ImportError: PyTorch is not installed.
    """
    import torch
    from safetensors.torch import save

    folder = _folder(source)
    files = sorted(path for path in folder.glob("pytorch_model*.bin"))
    if not files or not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: expected config.json and pytorch_model.bin. Got: neither")
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    config = json.loads((folder / "config.json").read_text())
    if "base_config" in config:
        config, tensors = sequence_classifier(config, tensors)
    with staged_folder(target) as staging:
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in folder.iterdir():
            beside = any(path.match(pattern) for pattern in _BESIDE)
            if beside and path.name not in ("config.json", _PICKLES[2]):
                (staging / path.name).write_bytes(path.read_bytes())
        whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        (staging / "model.safetensors").write_bytes(save(whole, metadata={"format": "pt"}))


def sequence_classifier(
    config: Mapping[str, Any], tensors: Tensors
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A backbone with a scalar head, as Hugging Face's class for sequence classification has it.

    Args:
      config: with the backbone's own in `base_config`, and `bias`, which rewards are less by.
      tensors: `lm_backbone.*`, `scalar_head.weight` and `scalar_head.bias`.

    Raises:
      CheckpointError: the last norm has no bias that the head's could go into.
    """
    base = dict(config["base_config"])
    try:
        family = family_of(base, "base_config")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    prefix = family.names.final_norm.partition(".")[0]
    found = {
        prefix + name.removeprefix("lm_backbone"): tensor
        for name, tensor in tensors.items()
        if name.startswith("lm_backbone.")
    }
    weight = tensors["scalar_head.weight"]
    added = tensors["scalar_head.bias"] - config.get("bias", 0.0)
    place = f"{family.names.final_norm}.bias"
    if place not in found and float(added.abs().max()):
        raise CheckpointError(f"{place}: there is no such bias for that of the head. Got: {added}")
    if place in found:
        # The head reads nothing else: weight @ shift is what its bias was.
        shift = weight[0] * (added / weight.square().sum())
        found[place] = found[place] + shift.to(found[place].dtype)
    found[f"{family.names.score}.weight"] = weight
    base |= {
        "architectures": [family.classifier],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    return base, found


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    repo, _, revision = source.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision or None, allow_patterns=[*_PICKLES, *_BESIDE]
            )
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source!r} is no local folder, and the hub did not give config.json and"
            f" pytorch_model.bin. Got: {str(error).partition(chr(10))[0]}"
        ) from error


def main(argv: Sequence[str]) -> None:
    with command.started(argv):
        if _SOURCE.value is None or _TARGET.value is None:
            raise ValueError("--source and --target must be given. Got: one of them, or none")
        convert(_SOURCE.value, Path(_TARGET.value))
        print(f"{_TARGET.value}: written")


if __name__ == "__main__":
    app.run(main)
