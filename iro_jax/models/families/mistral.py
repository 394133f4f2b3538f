"""Mistral 7B and its descendants: Llama with a sliding window in every layer, if any.
https://arxiv.org/abs/2310.06825"""

from iro_jax.models.config import TransformerConfig
from iro_jax.models.families.base import Family, HfConfig, WeightNames, common_fields


def _translate(hf: HfConfig) -> TransformerConfig:
    return TransformerConfig(**common_fields(hf))


MISTRAL = Family(
    model_type="mistral",
    causal="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    translate=_translate,
    names=WeightNames(),
    gguf_architecture="llama",
)
