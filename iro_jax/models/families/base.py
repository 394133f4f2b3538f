"""What a family is, and the translations that families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from iro_jax.models.config import Activation, Head, Layer, TransformerConfig
from iro_jax.models.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling

HfConfig = Mapping[str, Any]
"""A `config.json` after `transformers` has filled in its defaults and present names."""

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class WeightNames:
    """A family's names for its tensors, without `.weight` and `.bias`. Llama's by default.

    Names of a layer's tensors follow `layer`, in which `{}` is the layer's index. A fused
    `qkv` holds, for each head in turn, its query, key and value rows.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    score: str = "score"
    layer: str = "model.layers.{}."
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    qkv: str | None = None
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
      model_type: as `config.json` has it.
      causal, classifier: class names in `architectures`, with a language-model head and
        with a score head.
      translate: Hugging Face configuration to `TransformerConfig`.
      names: the checkpoint's tensor names.
      gguf_architecture: as `general.architecture` in a GGUF file has it.
    """

    model_type: str
    causal: str
    classifier: str
    translate: Callable[[HfConfig], TransformerConfig]
    names: WeightNames
    gguf_architecture: str

    def architecture(self, head: Head) -> str:
        return self.classifier if head == "score" else self.causal


def common_fields(hf: HfConfig, **fields: Any) -> dict[str, Any]:
    """The fields that most families spell alike; `fields` override or complete them."""
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    common = {
        "vocab_size": hf["vocab_size"],
        "embed_dim": hf["hidden_size"],
        "mlp_dim": hf["intermediate_size"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": head_dim,
        "context_length": hf["max_position_embeddings"],
        "layers": layers(hf, head_dim),
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "activation": activation(hf, "hidden_act"),
        "query_scale": head_dim**-0.5,
        "tied_embeddings": bool(hf.get("tie_word_embeddings")),
    }
    return common | fields


def activation(hf: HfConfig, field: str) -> Activation:
    if hf[field] not in _ACTIVATIONS:
        raise ValueError(f"{field} must be one of {sorted(_ACTIVATIONS)}. Got: {hf[field]!r}")
    return _ACTIVATIONS[hf[field]]


def layers(hf: HfConfig, head_dim: int) -> tuple[Layer, ...]:
    """One `Layer` per block, from `layer_types` where there are several kinds."""
    count = hf["num_hidden_layers"]
    window = hf.get("sliding_window")
    kinds = hf.get("layer_types")
    if kinds is None:
        kinds = ("sliding_attention" if window else "full_attention",) * count
    known = {
        "full_attention": Layer(rope(hf, head_dim, "full_attention")),
        "sliding_attention": Layer(rope(hf, head_dim, "sliding_attention"), window),
    }
    unknown = set(kinds) - set(known)
    if unknown or len(kinds) != count:
        raise ValueError(
            f"layer_types must be {count} (num_hidden_layers) of {sorted(known)}."
            f" Got: {list(kinds)}"
        )
    return tuple(known[kind] for kind in kinds)


def rope(hf: HfConfig, head_dim: int, kind: str) -> Rope:
    """The rotary embedding of layers of `kind`."""
    parameters = hf["rope_parameters"]
    if kind in parameters:
        parameters = parameters[kind]
    dimension = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    return Rope(float(parameters["rope_theta"]), dimension, _scaling(hf, parameters))


def _scaling(
    hf: HfConfig, parameters: Mapping[str, Any]
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    original = int(
        parameters.get("original_max_position_embeddings") or hf["max_position_embeddings"]
    )
    match parameters.get("rope_type", "default"):
        case "default":
            return None
        case "linear":
            return LinearScaling(float(parameters["factor"]))
        case "llama3":
            return Llama3Scaling(
                factor=float(parameters["factor"]),
                low_frequency_factor=float(parameters["low_freq_factor"]),
                high_frequency_factor=float(parameters["high_freq_factor"]),
                original_context=original,
            )
        case "yarn":
            return YarnScaling.from_parameters(parameters, original)
        case unknown:
            raise ValueError(
                f"rope_type must be 'default', 'linear', 'llama3' or 'yarn'. Got: {unknown!r}"
            )
