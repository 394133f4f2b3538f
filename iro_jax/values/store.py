"""Value functions on disk.

A linear head without bias on the final hidden state is written as a Hugging Face folder that
`AutoModelForSequenceClassification` opens, with LoRA merged. Every other head is written as
`value.json` and `value_head.safetensors`: beside its own backbone, or with the name of the
frozen one that it shares. A folder for `transformers` has these two files as well if its backbone
is shared, so that the head can go back to it. `from_pretrained` opens all of them, and any reward
model.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from iro_jax.models import CheckpointError, Network, Params, Pretrained, save_pretrained
from iro_jax.models import from_pretrained as load_model
from iro_jax.models.sharding import RULES, Rules
from iro_jax.models.weights import staged_folder
from iro_jax.models.weights.checkpoint import read_json
from iro_jax.values.function import ValueFunction, merge_adapters
from iro_jax.values.heads import Head, HeadParams
from iro_jax.values.network import ValueNetwork, ValueParams

DESCRIPTION = "value.json"
WEIGHTS = "value_head.safetensors"
_FORMAT = 1


def save_value(
    function: ValueFunction, folder: str | os.PathLike[str], *, card: str | None = None
) -> None:
    """Writes a value function; the folder appears whole or not at all.

    Args:
      folder: must not exist, or be empty.
      card: the text of its `README.md`.

    Raises:
      FileExistsError: there is something at `folder` already.
    """
    function = merge_adapters(function)
    extra = {} if card is None else {"README.md": card.encode()}
    shared = function.source if function.frozen else None
    whole = opens_in_transformers(function)
    if function.params.head is not None and (shared is not None or not whole):
        extra |= _head_files(function, shared)
    if whole:
        save_pretrained(_as_score_model(function), folder, extra_files=extra)
        return
    if shared is None:
        own = dataclasses.replace(function.model, params=function.params.backbone)
        save_pretrained(own, folder, extra_files=extra)
        return
    with staged_folder(Path(folder)) as staging:
        for name, content in extra.items():
            (staging / name).write_bytes(content)


def _head_files(function: ValueFunction, backbone: str | None) -> dict[str, bytes]:
    head, params = function.network.head, function.params.head
    assert head is not None
    assert params is not None
    named = {
        f"{index}.{name}": np.asarray(jax.device_get(array[0]))
        for index, layer in enumerate(params)
        for name, array in layer.items()
    }
    description = {
        "format": _FORMAT,
        "backbone": backbone,
        "layer": function.network.layer,
        "head": dataclasses.asdict(head),
    }
    return {
        WEIGHTS: safetensors.numpy.save(named),
        DESCRIPTION: (json.dumps(description, indent=2, sort_keys=True) + "\n").encode(),
    }


def opens_in_transformers(function: ValueFunction) -> bool:
    """Whether `AutoModelForSequenceClassification` can express the function."""
    head, network = function.network.head, function.network
    final = network.layer is None
    return final and (
        head is None or (not head.hidden and not head.bias and head.output == "identity")
    )


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    backbone: Pretrained | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> ValueFunction:
    """Opens an exported value function, or any (process) reward model with a score head.

    Args:
      name: a folder, or whatever `iro_jax.models.from_pretrained` takes.
      backbone: the frozen backbone that the function shares, if it is loaded already; a
        function that carries its own has no use for it.
      dtype, mesh, rules: as in `iro_jax.models.from_pretrained`.

    Raises:
      CheckpointError: it is incomplete, damaged, or no value function.
    """
    folder = Path(name)
    described = (folder / DESCRIPTION).exists()
    if not described or (backbone is None and _is_whole(folder)):
        model = load_model(name, dtype=dtype, mesh=mesh, rules=rules)
        if model.network.config.head != "score":
            raise CheckpointError(
                f"{model.origin}: neither a reward model nor an exported value function"
                f" (there is no {DESCRIPTION}). Got: a language model"
            )
        return ValueFunction(model, ValueNetwork(model.network), ValueParams(model.params))
    description = _read_description(folder)
    head, source = description["head"], description["backbone"]
    if source is None:
        model = load_model(folder, dtype=dtype, mesh=mesh, rules=rules)
    else:
        model = backbone or load_model(source, dtype=dtype, mesh=mesh, rules=rules)
    params = _read_head(folder / WEIGHTS, head, model.network.config.embed_dim)
    try:
        network = ValueNetwork(model.network, head, description["layer"])
    except ValueError as error:
        raise CheckpointError(f"{folder / DESCRIPTION}: {error}") from error
    return ValueFunction(model, network, ValueParams(model.params, params), source)


def _is_whole(folder: Path) -> bool:
    """Whether a described head also stands there as a score network with its backbone."""
    model = folder / "config.json"
    return model.exists() and _read_description(folder)["backbone"] is not None


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    description = read_json(path)
    if description.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: expected format {_FORMAT}. Got: {description.get('format')!r}"
        )
    missing = {"backbone", "layer", "head"} - set(description)
    if missing:
        raise CheckpointError(f"{path}: fields are missing. Got: no {', '.join(sorted(missing))}")
    try:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in description["head"].items()
        }
        return description | {"head": Head(**fields)}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the head's description is broken ({error})") from error


def _read_head(path: Path, head: Head, width: int) -> HeadParams:
    try:
        named = safetensors.numpy.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: missing, truncated or not safetensors ({error})") from error
    layers = jax.eval_shape(lambda: head.init(jax.random.key(0), width))
    wanted = {
        f"{index}.{name}": array.shape[1:]
        for index, layer in enumerate(layers)
        for name, array in layer.items()
    }
    found = {name: array.shape for name, array in named.items()}
    if found != wanted:
        raise CheckpointError(
            f"{path}: a head like this on a backbone of width {width} has {wanted}. Got: {found}"
        )
    return tuple(
        {name: jnp.asarray(named[f"{index}.{name}"])[None] for name in layer}
        for index, layer in enumerate(layers)
    )


def _as_score_model(function: ValueFunction) -> Pretrained:
    """A network with a score head, in the words of `transformers`."""
    model = function.model
    params, network = function.params.backbone, function.network.network
    if function.params.head is not None:
        network = Network(network.config.replace(head="score"), rules=network.rules)
        kernel = function.params.head[0]["kernel"][0].T
        params = _with_score_head(params, network, kernel)
    tokenizer, pad = _with_unused_pad(model.tokenizer, model.eos_ids, network.config.vocab_size)
    return dataclasses.replace(
        model,
        network=network,
        params=params,
        tokenizer=tokenizer,
        hf_config=model.hf_config | {"pad_token_id": pad},
    )


def _with_score_head(params: Params, network: Network, kernel: jax.Array) -> Params:
    abstract = dict(nnx.to_flat_state(network.abstract_params()))
    flat = dict(nnx.to_flat_state(params)) | {
        ("score_head",): abstract["score_head",].replace(kernel)
    }
    return nnx.from_flat_state({path: flat[path] for path in abstract})


def _with_unused_pad(
    tokenizer: PreTrainedTokenizerBase | None, eos_ids: Sequence[int], vocab_size: int
) -> tuple[PreTrainedTokenizerBase | None, int | None]:
    """A tokenizer whose padding token stands in no text, and that token's id.

    `transformers` reads a score at the last token that is not padding. Where padding equals
    EOS, as SmolLM2 has it, it would skip the EOS.
    """
    if tokenizer is None:
        return None, None
    template = tokenizer.chat_template or ""
    working = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, *eos_ids}

    def unused(token_id: int, token: str) -> bool:
        return token_id not in working and token not in template

    pad = tokenizer.pad_token
    if pad is not None and unused(tokenizer.pad_token_id, pad):
        return tokenizer, tokenizer.pad_token_id
    tokenizer = copy.deepcopy(tokenizer)
    if len(tokenizer) < vocab_size and max(tokenizer.get_vocab().values()) < vocab_size - 1:
        tokenizer.add_special_tokens({"pad_token": "<|value_pad|>"})
        return tokenizer, tokenizer.pad_token_id
    for token_id, entry in sorted(tokenizer.added_tokens_decoder.items(), reverse=True):
        if entry.special and unused(token_id, entry.content):
            tokenizer.pad_token = entry.content
            return tokenizer, token_id
    return tokenizer, None
