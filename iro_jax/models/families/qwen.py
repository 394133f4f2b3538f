"""Qwen2 and 2.5 (biases on query, key and value) and Qwen3 (norms on query and key heads).
https://arxiv.org/abs/2412.15115, https://arxiv.org/abs/2505.09388"""

from iro_jax.models.config import TransformerConfig
from iro_jax.models.families.base import Family, HfConfig, WeightNames, common_fields


def _translate_qwen2(hf: HfConfig) -> TransformerConfig:
    return TransformerConfig(**common_fields(hf, qkv_bias=True))


def _translate_qwen3(hf: HfConfig) -> TransformerConfig:
    bias = bool(hf.get("attention_bias"))
    return TransformerConfig(**common_fields(hf, qk_norm=True, qkv_bias=bias, output_bias=bias))


QWEN2 = Family(
    model_type="qwen2",
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    translate=_translate_qwen2,
    names=WeightNames(),
    gguf_architecture="qwen2",
)

QWEN3 = Family(
    model_type="qwen3",
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    translate=_translate_qwen3,
    names=WeightNames(),
    gguf_architecture="qwen3",
)
