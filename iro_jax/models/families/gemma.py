"""Gemma 2 (softcaps, every second layer local) and Gemma 3 text (norms on query and key
heads, five local layers to a global one, a rotary base for each kind).
https://arxiv.org/abs/2408.00118, https://arxiv.org/abs/2503.19786"""

from typing import Any

from iro_jax.models.config import TransformerConfig
from iro_jax.models.families.base import Family, HfConfig, WeightNames, common_fields

_NAMES = WeightNames(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def _translate(hf: HfConfig, **fields: Any) -> TransformerConfig:
    if hf.get("use_bidirectional_attention"):
        raise ValueError(
            "use_bidirectional_attention must be false, a policy reads from left"
            f" to right. Got: {hf['use_bidirectional_attention']!r}"
        )
    bias = bool(hf.get("attention_bias"))
    return TransformerConfig(
        **common_fields(
            {**hf, "hidden_act": hf["hidden_activation"]},
            norm_plus_one=True,
            post_norms=True,
            scale_embeddings=True,
            qkv_bias=bias,
            output_bias=bias,
            query_scale=hf["query_pre_attn_scalar"] ** -0.5,
            attention_softcap=hf.get("attn_logit_softcapping"),
            logit_softcap=hf.get("final_logit_softcapping"),
            **fields,
        )
    )


def _translate_gemma3(hf: HfConfig) -> TransformerConfig:
    return _translate(hf, qk_norm=True)


GEMMA2 = Family(
    model_type="gemma2",
    causal="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    translate=_translate,
    names=_NAMES,
    gguf_architecture="gemma2",
)

GEMMA3 = Family(
    model_type="gemma3_text",
    causal="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    translate=_translate_gemma3,
    names=_NAMES,
    gguf_architecture="gemma3",
)
