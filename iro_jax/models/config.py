"""The one description of a decoder-only transformer, whatever its family.

A `TransformerConfig` says what the arithmetic is, not where it came from: the families in
`iro_jax.models.families` translate a Hugging Face configuration into it, and nothing else
in the library ever asks for a family's name. It is frozen and hashable, so that it can be
a static argument of `jax.jit`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from iro_jax.models.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "layer"]
Head = Literal["logits", "score"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ between the layers of one network.

    `window`: a query sees the last `window` positions, itself included; None sees them all.
    """

    rope: Rope
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Architecture of one network. Sizes are counts of scalars unless said otherwise.

    Attributes:
      vocab_size: rows of the embedding.
      embed_dim: width of the residual stream.
      mlp_dim: hidden width of the MLP.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of a head.
      context_length: longest sequence the checkpoint was made for, in tokens.
      layers: one `Layer` per block.
      norm: RMSNorm, or LayerNorm with bias.
      norm_epsilon: added to the variance.
      norm_plus_one: the stored scale is an offset from one (Gemma).
      post_norms: a second norm after attention and after the MLP (Gemma 2 and 3).
      qk_norm: RMSNorm over each query and key head (Qwen3, Gemma 3).
      parallel_residual: attention and MLP read the same input (GPT-NeoX).
      gated_mlp: activation(gate) * up, or a plain two-layer MLP.
      activation: of the MLP.
      qkv_bias, output_bias, mlp_bias: which projections carry biases.
      query_scale: factor on the attention scores.
      attention_softcap, logit_softcap: `cap * tanh(x / cap)`, or None.
      scale_embeddings: embeddings times `sqrt(embed_dim)` (Gemma).
      tied_embeddings: the unembedding is the embedding.
      head: what the network ends in: `logits` over the vocabulary, or a scalar `score`.
      dtype: of the computation, `float32` or `bfloat16`. Norms and softmax are always f32.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    layers: tuple[Layer, ...]
    norm: Norm = "rms"
    norm_epsilon: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    gated_mlp: bool = True
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embeddings: bool = False
    tied_embeddings: bool = False
    head: Head = "logits"
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got: {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_kv_heads must divide num_heads."
                f" Got: num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
            )
        if not self.layers:
            raise ValueError("A network needs at least one layer. Got: layers=()")
        for name, choices in (
            ("dtype", ("float32", "bfloat16")),
            ("head", get_args(Head)),
            ("norm", get_args(Norm)),
            ("activation", get_args(Activation)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}. Got: {getattr(self, name)!r}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    def replace(self, **changes) -> TransformerConfig:
        return dataclasses.replace(self, **changes)
