"""FLOPs of reading and sampling: matrix products, each multiplication and addition as two.

The projections of every layer, the scores and the weighted sums of attention, and what the network
ends in; norms, activations and the softmax are left out. Tokens are real ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from iro_jax.models.config import TransformerConfig


def forward_flops(
    config: TransformerConfig,
    new_tokens: ArrayLike,
    context: ArrayLike = 0,
    *,
    layers: int | None = None,
    outputs: ArrayLike | None = None,
    lora_rank: int = 0,
) -> float:
    """FLOPs of reading `new_tokens` at once, each attending to `context + new_tokens` of them.

    Causal masks save nothing when tokens are read at once: hidden scores are computed too. The
    same holds for sliding windows.

    Args:
      config: of the network.
      new_tokens: of a text, or an array with one number for each of many texts, which are summed;
        the other numbers may be arrays likewise.
      context: tokens of the same text that are in the cache already.
      layers: blocks that are run; all by default.
      outputs: tokens that the network's head (`config.head`) is applied to; all new ones by
        default, or none if `layers` is given.
      lora_rank: of adapters on every projection that are not merged into it.
    """
    if outputs is None:
        outputs = new_tokens if layers is None else 0
    new, before, outputs = _per_text(new_tokens, context, outputs)
    return _total(config, new, new * (before + new), layers, outputs, lora_rank)


def decode_flops(config: TransformerConfig, new_tokens: ArrayLike, context: ArrayLike = 0) -> float:
    """FLOPs of sampling `new_tokens` one by one, each attending to those before and itself.

    The arguments are those of `forward_flops`. The last token sampled is counted like the others
    although nothing reads it but a further chunk.
    """
    new, before = _per_text(new_tokens, context)
    return _total(config, new, new * before + new * (new + 1) / 2, None, new, 0)


def _per_text(*counts: ArrayLike) -> tuple[np.ndarray, ...]:
    """Numbers for the same texts; f64, because products of token counts may pass 2^63."""
    return np.broadcast_arrays(*(np.asarray(count, np.float64) for count in counts))


def _total(
    config: TransformerConfig,
    tokens: np.ndarray,
    pairs: np.ndarray,
    layers: int | None,
    outputs: np.ndarray,
    lora_rank: int,
) -> float:
    """FLOPs of so many tokens, pairs of a query and a key, and outputs of the head."""
    if layers is not None and not 0 <= layers <= config.num_layers:
        raise ValueError(f"layers must be from 0 to {config.num_layers}. Got: {layers}")
    query_width = config.num_heads * config.head_dim
    shapes = (
        (config.embed_dim, query_width + 2 * config.num_kv_heads * config.head_dim),
        (query_width, config.embed_dim),
        (config.embed_dim, (2 if config.gated_mlp else 1) * config.mlp_dim),
        (config.mlp_dim, config.embed_dim),
    )
    per_token = sum(2 * (i * o + lora_rank * (i + o)) for i, o in shapes)
    per_pair = 2 * 2 * query_width
    per_output = 2 * config.embed_dim * (config.vocab_size if config.head == "logits" else 1)
    blocks = config.num_layers if layers is None else layers
    return float(
        blocks * (per_token * np.sum(tokens) + per_pair * np.sum(pairs))
        + per_output * np.sum(outputs)
    )
