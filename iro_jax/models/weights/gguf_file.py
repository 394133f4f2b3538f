"""Checkpoints in one GGUF file: tensors, configuration, tokenizer and chat template.

Tensors are dequantised by the `gguf` package, row block by row block, and presented under
Hugging Face's names and conventions, so that nothing after this module knows of GGUF. The
conversion to GGUF changes three things, undone here: Llama's query and key rows are
interleaved for llama.cpp's rotary embedding, GPT-NeoX's fused rows are grouped by kind, and
Gemma's norm scales have one added.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from iro_jax.models.families import FAMILIES, Family, translate_config
from iro_jax.models.weights.checkpoint import CheckpointError, id_set
from iro_jax.models.weights.gguf_tokenizer import build_tokenizer
from iro_jax.models.weights.layout import checkpoint_layout, tensor_shapes

_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K")

# GGUF's metadata keys, without the architecture, and the field of `config.json` for each.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
    "rope.freq_base": "rope_theta",
}


_REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
)


class Reader(gguf.GGUFReader):
    """Reads the metadata in a third of the time, most of which goes into slicing the file.

    It is a plain array here, over the same mapped memory; slices of `np.memmap` are slower.
    """

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)


class GgufFile:
    """A `Checkpoint` read from a GGUF file of one of the seven families.

    Raises:
      CheckpointError: the file is truncated, or holds an architecture, a tensor or a
        quantisation that is not supported.
    """

    def __init__(self, path: Path):
        self.origin = path
        try:
            reader = Reader(path)
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: file not found") from error
        except Exception as error:  # the reader trusts every length in the file
            raise CheckpointError(f"{path}: truncated or not a GGUF file ({error})") from error
        self.family = _family(self.metadata, path)
        try:
            self.hf_config = _hf_config(self.metadata, tensors, self.family)
            self._tensors = _rename(tensors, self.family, self.hf_config, path)
        except KeyError as error:
            raise CheckpointError(f"{path}: the file does not say {error}") from error
        except CheckpointError:
            raise
        except (ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.dtypes: Mapping[str, str] = dict.fromkeys(self._tensors, "F32")
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._tensors[name]
        order = self._row_order(name)
        rows = index[0] if order is None else order[index[0]]
        block = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
        if self.family.gguf_architecture.startswith("gemma") and name.endswith("norm.weight"):
            block = block - np.float32(1.0)
        return block[:, *index[1:]]

    def location(self, name: str) -> Path:
        return self.origin

    @property
    def eos_ids(self) -> tuple[int, ...]:
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        return id_set(*(self.metadata.get(f"tokenizer.ggml.{key}") for key in keys))

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        if "tokenizer.ggml.tokens" not in self.metadata:
            return None
        try:
            return build_tokenizer(self.metadata, self.origin)
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare exceptions
            raise CheckpointError(
                f"{self.origin}: the tokenizer cannot be built ({type(error).__name__}: {error})"
            ) from error

    def _row_order(self, name: str) -> np.ndarray | None:
        """For each row of the Hugging Face tensor, its row in the file; None if the same."""
        rows = np.arange(self.shapes[name][0])
        heads = self.hf_config["num_attention_heads"]
        if ".query_key_value." in name:
            return rows.reshape(3, heads, -1).swapaxes(0, 1).reshape(-1)
        if self.family.gguf_architecture == "llama" and ".k_proj." in name:
            heads = self.hf_config.get("num_key_value_heads", heads)
        elif self.family.gguf_architecture != "llama" or ".q_proj." not in name:
            return None
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _family(metadata: Mapping[str, Any], path: Path) -> Family:
    architecture = metadata.get("general.architecture")
    known = {family.gguf_architecture for family in FAMILIES.values()}
    if architecture not in known:
        raise CheckpointError(
            f"{path}: general.architecture must be one of {sorted(known)}. Got: {architecture!r}"
        )
    if architecture == "llama" and metadata.get("llama.attention.sliding_window"):
        return FAMILIES["mistral"]
    return next(f for f in FAMILIES.values() if f.gguf_architecture == architecture)


def _hf_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor], family: Family
) -> dict[str, Any]:
    """The `config.json` that the metadata stand for."""
    prefix = family.gguf_architecture + "."
    for key in _REQUIRED:
        if prefix + key not in metadata:
            raise KeyError(prefix + key)
    config = {
        field: metadata[prefix + key] for key, field in _FIELDS.items() if prefix + key in metadata
    }
    ids = {key: metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")}
    config |= {
        "model_type": family.model_type,
        "architectures": [family.causal],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        **ids,
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config.update(_rope_fields(metadata, tensors, prefix, head_dim, config.pop("rope_theta", 1e4)))
    if family.model_type == "gpt_neox":
        config["hidden_act"] = "gelu"
    if family.model_type.startswith("gemma"):
        # llama.cpp scales by head_dim too, except in the 27B models, told by their depth.
        largest = config["num_hidden_layers"] in (46, 62)
        per_head = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = per_head if largest else head_dim
    return config


def _rope_fields(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, gguf.ReaderTensor],
    prefix: str,
    head_dim: int,
    theta: float,
) -> dict[str, Any]:
    scaling: dict[str, Any] = {}
    kind = metadata.get(prefix + "rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": metadata[prefix + "rope.scaling.factor"]}
        original = metadata.get(prefix + "rope.scaling.original_context_length")
        if original:
            scaling["original_max_position_embeddings"] = original
    if "rope_freqs.weight" in tensors:
        scaling = _llama3_scaling(tensors["rope_freqs.weight"].data)
    if prefix == "gemma3.":
        full = {"rope_type": "default", "rope_theta": theta} | scaling
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling or None}
    rotary = metadata.get(prefix + "rope.dimension_count", head_dim)
    if prefix == "gptneox.":
        fields |= {"rotary_pct": rotary / head_dim, "rotary_emb_base": theta}
    return fields


def _llama3_scaling(divisors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's rope scaling; GGUF stores its effect, the divisor of each frequency."""
    return {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _rename(
    tensors: Mapping[str, gguf.ReaderTensor], family: Family, hf_config: dict[str, Any], path: Path
) -> dict[str, gguf.ReaderTensor]:
    """The file's tensors under the names that the family's checkpoints use."""
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(
        architectures[family.gguf_architecture], hf_config["num_hidden_layers"]
    )
    config = translate_config(hf_config, origin="metadata")
    renamed = {}
    for name in tensor_shapes(checkpoint_layout(config, family.names)):
        stem, suffix = name.rsplit(".", 1)
        tensor = tensors.get(f"{names.get_name(stem)}.{suffix}")
        if tensor is None:
            continue
        if tensor.tensor_type.name not in _TYPES:
            raise CheckpointError(
                f"{path}: {tensor.name} must be stored as one of {', '.join(_TYPES)}."
                f" Got: {tensor.tensor_type.name}"
            )
        renamed[name] = tensor
    return renamed
