"""Networks by the names that configurations give them, without their weights.

The shapes of the paper's models are built in: planning needs neither the hub nor a download.
Anything else is read from its `config.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub

from iro_jax.models import TransformerConfig, translate_config
from iro_jax.models.config import Head
from iro_jax.models.weights.sources import open_checkpoint

_LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_LLAMA_3_70B = _LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_MISTRAL_7B = _LLAMA_3_8B | {
    "model_type": "mistral",
    "vocab_size": 32_000,
    "max_position_embeddings": 32_768,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
}
_QWEN_2_5_3B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_QWEN_2_5_1_5B = _QWEN_2_5_3B | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
_PYTHIA_1B: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
_PYTHIA_6_9B = _PYTHIA_1B | {
    "vocab_size": 50_432,
    "hidden_size": 4096,
    "intermediate_size": 16_384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

# By what a name contains; the first that matches.
BUILT_IN: dict[str, dict[str, Any]] = {
    r"llama-?3-70b": _LLAMA_3_70B,
    r"llama-?3-8b|fsfairx-llama3": _LLAMA_3_8B,
    r"mistral-7b|zephyr-7b": _MISTRAL_7B,
    r"qwen2\.5-3b": _QWEN_2_5_3B,
    r"qwen2\.5-1\.5b": _QWEN_2_5_1_5B,
    r"pythia-1b": _PYTHIA_1B,
    r"pythia-6\.9b": _PYTHIA_6_9B,
    r"smollm2(-135m)?(?!-)|smollm2-135m": _SMOLLM2,
}


def architecture(
    name: str,
    *,
    head: Head | None = None,
    dtype: str | None = None,
) -> TransformerConfig:
    """The configuration of a network.

    Args:
      name: a folder with a `config.json`, or such a file; a name that the built-in table knows;
        or anything that `iro_jax.models.from_pretrained` opens.
      head: what it ends in; by default what its architecture says.
      dtype: of weights and computation; by default what its weights are stored in.

    Raises:
      ValueError: there is none of that name.
    """
    found = hf_config(name)
    if dtype is None:
        stored = found.get("torch_dtype", found.get("dtype"))
        dtype = "bfloat16" if stored == "bfloat16" else "float32"
    return translate_config(found, head=head, dtype=dtype, origin=name)


def hf_config(name: str) -> dict[str, Any]:
    """What the `config.json` of a network says, as far as shapes go."""
    path = Path(name).expanduser()
    for file in (path, path / "config.json"):
        if file.is_file() and file.suffix == ".json":
            return json.loads(file.read_text())
    if not path.exists():
        if "/" in name and (built_in := _built_in(name.rpartition("/")[2])):
            return _cached(name) or built_in
        if built_in := _built_in(name):
            return built_in
    return dict(open_checkpoint(name).hf_config)


def _built_in(name: str) -> dict[str, Any] | None:
    return next(
        (fields for known, fields in BUILT_IN.items() if re.search(known, name, re.IGNORECASE)),
        None,
    )


def _cached(name: str) -> dict[str, Any] | None:
    """The `config.json` that an earlier download has left."""
    repository = name.partition("@")[0]
    found = huggingface_hub.try_to_load_from_cache(repository, "config.json")
    return json.loads(Path(found).read_text()) if isinstance(found, str) else None
