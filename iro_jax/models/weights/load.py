"""Checkpoints to networks and back.

Everything that can be wrong with a checkpoint is found from headers and configuration,
before the first weight is read. Then each parameter goes straight from the file to the
devices that hold it: a device's shard is assembled from the parts of the tensors it is
made of, in small blocks, so that no more than two shards are ever on the host.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from iro_jax.models.config import Head
from iro_jax.models.families import family_of, translate_config
from iro_jax.models.network import Network, Params
from iro_jax.models.sharding import RULES, Rules
from iro_jax.models.weights.assemble import load_parameter
from iro_jax.models.weights.checkpoint import Checkpoint, CheckpointError, id_set
from iro_jax.models.weights.layout import (
    Layout,
    ParamPath,
    Piece,
    checkpoint_layout,
    tensor_shapes,
)
from iro_jax.models.weights.memory import HostMemory
from iro_jax.models.weights.safetensors_folder import write_folder
from iro_jax.models.weights.sources import open_checkpoint

_PROGRESS_BYTES = 2**30
_LOADERS = 2
_STORED = ("F64", "F32", "F16", "BF16")

# Tensors that some checkpoints carry and no network of ours needs.
_IGNORED = re.compile(
    r".*(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias)|lm_head\.weight"
    r"|embed_out\.weight|score\.weight|v_head\..*"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A network with its weights and everything else its checkpoint knows.

    Attributes:
      network: the architecture as pure functions.
      params: the weights.
      tokenizer: the checkpoint's own, or None if it came without one.
      eos_ids: tokens that end an answer.
      hf_config: what `config.json` says (for a GGUF file, what it would say).
      origin: the folder or file it was read from.
    """

    network: Network
    params: Params
    tokenizer: PreTrainedTokenizerBase | None
    eos_ids: tuple[int, ...]
    hf_config: dict[str, Any]
    origin: Path


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> Pretrained:
    """Loads a checkpoint: a policy, a reward model or a value function.

    Args:
      name: a folder, a GGUF file, `pip:PACKAGE` or a hub name; see
        `iro_jax.models.weights.sources`.
      head: what the network ends in, `logits` or `score`; by default what the checkpoint's
        architecture says.
      dtype: of weights and computation, `float32` or `bfloat16`. By default each weight is
        kept as stored (f16 and GGUF as f32) and the computation is in the type of the
        embedding.
      mesh: devices to spread the weights over, by `rules`; one device if None.
      rules: logical axis names to mesh axes; the network keeps to them.

    Raises:
      CheckpointError: the checkpoint is incomplete, damaged, of an unknown architecture, or
        its tensors or tokenizer do not fit its configuration. Nothing is on a device then.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16'. Got: {dtype!r}")
    if head not in (None, *get_args(Head)):
        raise ValueError(f"head must be one of {get_args(Head)}. Got: {head!r}")
    checkpoint = open_checkpoint(name)
    is_file = checkpoint.origin.is_file()
    origin = str(checkpoint.origin if is_file else checkpoint.origin / "config.json")
    try:
        family = family_of(checkpoint.hf_config, origin)
        config = translate_config(checkpoint.hf_config, head=head, origin=origin)
        layout = checkpoint_layout(config, family.names)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    _check_tensors(checkpoint, layout)
    stored = {path: _stored_dtype(checkpoint, pieces) for path, pieces in layout.items()}
    dtypes = stored if dtype is None else dict.fromkeys(layout, dtype)
    network = Network(config.replace(dtype=dtypes["embedding",]), rules=rules)
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.vocab_size, str(checkpoint.origin))
    eos = id_set(checkpoint.eos_ids, tokenizer.eos_token_id if tokenizer is not None else None)
    return Pretrained(
        network=network,
        params=_load(checkpoint, network, layout, dtypes, mesh),
        tokenizer=tokenizer,
        eos_ids=eos,
        hf_config=dict(checkpoint.hf_config),
        origin=checkpoint.origin,
    )


def save_pretrained(
    model: Pretrained,
    folder: str | os.PathLike[str],
    *,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a safetensors folder that `transformers` opens and that reads back bit for bit.

    The folder appears whole or not at all, `extra_files` (by name) included.

    Raises:
      FileExistsError: there is something at `folder` already.
      ValueError: the network is not the one that `model.hf_config` describes.
    """
    config = model.network.config
    family = family_of(model.hf_config)
    if translate_config(model.hf_config, head=config.head, dtype=config.dtype) != config:
        raise ValueError(
            "The network's configuration was changed after loading: hf_config, which would be"
            " written to config.json, describes another one"
        )
    flat = dict(nnx.to_flat_state(model.params))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, pieces in checkpoint_layout(config, family.names).items():
            parameter = np.asarray(jax.device_get(flat[path].get_value()))
            for piece in pieces:
                yield piece.name, piece.extract(parameter)

    stored = flat["embedding",].get_value().dtype.name
    architecture = family.architecture(config.head)
    hf_config = model.hf_config | {"architectures": [architecture], "dtype": stored}
    hf_config.pop("torch_dtype", None)
    if config.head == "score":
        hf_config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    eos = list(model.eos_ids)
    write_folder(
        Path(folder),
        hf_config,
        tensors(),
        tokenizer=model.tokenizer,
        generation_config={"eos_token_id": eos} if eos and config.head == "logits" else None,
        extra_files=extra_files,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, origin: str) -> None:
    """Checks that the tokenizer's ids have embeddings.

    Added special tokens past the embedding are allowed as long as they are not the ones that
    begin or end text (Gemma 3 has such a token for images); `Sampler` rejects prompts with them.

    Raises:
      CheckpointError: they have not.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    working = id_set(tokenizer.bos_token_id, tokenizer.eos_token_id)
    if tokenizer.vocab_size > vocab_size or any(i >= vocab_size for i in working):
        raise CheckpointError(
            f"{origin}: the tokenizer does not fit: it has {tokenizer.vocab_size} tokens"
            f" (largest id {largest}), config.json says vocab_size={vocab_size}"
        )
    if len(tokenizer) < vocab_size // 2:
        logging.warning(
            "%s: the tokenizer has %d tokens, less than half of vocab_size=%d. Is it this model's?",
            origin,
            len(tokenizer),
            vocab_size,
        )


def _check_tensors(checkpoint: Checkpoint, layout: Layout) -> None:
    needed = tensor_shapes(layout)
    for name, shape in needed.items():
        if name not in checkpoint.shapes:
            reason = " (it is not a reward model)" if name == "score.weight" else ""
            raise CheckpointError(f"{checkpoint.origin}: tensor {name!r} is missing{reason}")
        if checkpoint.shapes[name] != shape:
            raise CheckpointError(
                f"{checkpoint.location(name)}: tensor {name!r} must have shape {shape}, says"
                f" config.json. Got: {checkpoint.shapes[name]}"
            )
    for name in needed:
        if checkpoint.dtypes[name] not in _STORED:
            raise CheckpointError(
                f"{checkpoint.location(name)}: tensor {name!r} must be stored as one of"
                f" {', '.join(_STORED)}. Got: {checkpoint.dtypes[name]}"
            )
    extra = [n for n in checkpoint.shapes if n not in needed and not _IGNORED.fullmatch(n)]
    if extra:
        raise CheckpointError(
            f"{checkpoint.location(extra[0])}: config.json has no place for tensor {extra[0]!r}"
            f" ({len(extra)} such tensors)"
        )


def _stored_dtype(checkpoint: Checkpoint, pieces: tuple[Piece, ...]) -> str:
    kinds = {checkpoint.dtypes[piece.name] for piece in pieces}
    return "bfloat16" if kinds == {"BF16"} else "float32"


def _load(
    checkpoint: Checkpoint,
    network: Network,
    layout: Layout,
    dtypes: Mapping[ParamPath, str],
    mesh: Mesh | None,
) -> Params:
    abstract = dict(nnx.to_flat_state(network.abstract_params()))
    shardings: dict[ParamPath, Sharding]
    if mesh is None:
        shardings = dict.fromkeys(abstract, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        flat = nnx.to_flat_state(network.param_shardings(mesh))
        shardings = {path: variable.get_value() for path, variable in flat}
    total = sum(
        variable.size * jnp.dtype(dtypes[path]).itemsize for path, variable in abstract.items()
    )
    progress = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=f"Loading {checkpoint.origin.name}",
        disable=None if total > _PROGRESS_BYTES else True,
    )
    # CPU devices keep the memory that weights were read into, others copy it.
    devices: set[jax.Device] = next(iter(shardings.values())).device_set
    on_cpu = all(device.platform == "cpu" for device in devices)
    empty = HostMemory().empty if on_cpu else np.empty

    def load(path: ParamPath) -> jax.Array:
        shape, dtype = tuple(abstract[path].shape), jnp.dtype(dtypes[path])
        return load_parameter(checkpoint, layout[path], shape, dtype, shardings[path], empty)

    loaded = {}
    # One decodes while the other copies: as many shards are on the host.
    with progress, ThreadPoolExecutor(_LOADERS) as loaders:
        for (path, variable), array in zip(
            abstract.items(), loaders.map(load, abstract), strict=True
        ):
            loaded[path] = variable.replace(array)
            progress.update(array.nbytes)
    return nnx.from_flat_state(loaded)
