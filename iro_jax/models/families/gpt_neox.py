"""GPT-NeoX and Pythia: parallel residual, partial rotary embedding, LayerNorm, biases.
https://arxiv.org/abs/2304.01373"""

from iro_jax.models.config import TransformerConfig
from iro_jax.models.families.base import Family, HfConfig, WeightNames, common_fields

_NAMES = WeightNames(
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    unembedding="embed_out",
    layer="gpt_neox.layers.{}.",
    qkv="attention.query_key_value",
    output="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def _translate(hf: HfConfig) -> TransformerConfig:
    return TransformerConfig(
        **common_fields(
            hf,
            norm="layer",
            norm_epsilon=hf["layer_norm_eps"],
            parallel_residual=bool(hf["use_parallel_residual"]),
            gated_mlp=False,
            qkv_bias=bool(hf["attention_bias"]),
            output_bias=bool(hf["attention_bias"]),
            mlp_bias=True,
        )
    )


GPT_NEOX = Family(
    model_type="gpt_neox",
    causal="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    translate=_translate,
    names=_NAMES,
    gguf_architecture="gptneox",
)
