"""Llama 2, 3 and 3.1, and every checkpoint that says it is one (SmolLM2, FsfairX, Zephyr's
ancestors). https://arxiv.org/abs/2407.21783"""

from iro_jax.models.config import TransformerConfig
from iro_jax.models.families.base import Family, HfConfig, WeightNames, common_fields


def _translate(hf: HfConfig) -> TransformerConfig:
    return TransformerConfig(
        **common_fields(
            hf,
            qkv_bias=bool(hf.get("attention_bias")),
            output_bias=bool(hf.get("attention_bias")),
            mlp_bias=bool(hf.get("mlp_bias")),
        )
    )


LLAMA = Family(
    model_type="llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    translate=_translate,
    names=WeightNames(),
    gguf_architecture="llama",
)
