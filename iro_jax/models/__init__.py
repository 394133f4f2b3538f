"""Decoder-only transformers as pure functions: networks, caches, weights, text, sampling."""

from iro_jax.models.cache import Cache, CachePart
from iro_jax.models.coded import code_weights
from iro_jax.models.config import Layer, TransformerConfig
from iro_jax.models.families import FAMILIES, translate_config
from iro_jax.models.generate import (
    Answers,
    Completion,
    Sampler,
    draw_keys,
    generate,
    prompt_keys,
)
from iro_jax.models.network import Network, Outputs, Params
from iro_jax.models.rope import Rope
from iro_jax.models.sampling import Draw, Sampling, draw, gumbel_noise, warp
from iro_jax.models.sharding import RULES, make_mesh
from iro_jax.models.text import (
    Conversation,
    PromptBatch,
    TextFormat,
    bucket_length,
    pad_prompts,
    render,
    same_tokenizer,
)
from iro_jax.models.weights import (
    CheckpointError,
    HubError,
    Pretrained,
    from_pretrained,
    save_pretrained,
)

__all__ = [
    "FAMILIES",
    "RULES",
    "Answers",
    "Cache",
    "CachePart",
    "CheckpointError",
    "Completion",
    "Conversation",
    "Draw",
    "HubError",
    "Layer",
    "Network",
    "Outputs",
    "Params",
    "Pretrained",
    "PromptBatch",
    "Rope",
    "Sampler",
    "Sampling",
    "TextFormat",
    "TransformerConfig",
    "bucket_length",
    "code_weights",
    "draw",
    "draw_keys",
    "from_pretrained",
    "generate",
    "gumbel_noise",
    "make_mesh",
    "pad_prompts",
    "prompt_keys",
    "render",
    "same_tokenizer",
    "save_pretrained",
    "translate_config",
    "warp",
]
