"""A dummy model and tokenizers small enough that a test runs in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from iro_jax.models import Network, Pretrained, translate_config
from iro_jax.models.config import Layer, TransformerConfig
from iro_jax.models.rope import Rope

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<turn> {{ message['role'] }} {{ message['content'] }} </turn> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)


def tiny_config(**changes: Any) -> TransformerConfig:
    """Two layers of width 16 over 64 tokens; `changes` replace fields."""
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "embed_dim": 16,
        "mlp_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "context_length": 128,
        "layers": (Layer(Rope(10000.0, 8)),) * 2,
        "query_scale": 8**-0.5,
    }
    return TransformerConfig(**(fields | changes))


def tiny_network(**changes: Any) -> Network:
    """The network of `tiny_config`."""
    return Network(tiny_config(**changes))


def tiny_pretrained(
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int | None = None,
    head: Literal["logits", "score"] = "logits",
    width: int = 16,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
    origin: Path = Path("tiny"),
) -> Pretrained:
    """A Llama of two layers with random weights, large enough that hidden states differ by units.

    Args:
      tokenizer: what it reads text with.
      vocab_size: rows of the embedding, if not one for each token.
      eos_ids: tokens that end an answer; by default the tokenizer's EOS.
    """
    hf_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    network = Network(translate_config(hf_config, head=head))
    params = jax.tree.map(lambda x: 8 * x, network.init(jax.random.key(seed)))
    ends = (tokenizer.eos_token_id,) if eos_ids is None else tuple(eos_ids)
    return Pretrained(network, params, tokenizer, ends, hf_config, origin)


def word_tokenizer(words: Sequence[str], *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, special tokens first, with a chat template.

    Args:
      words: the vocabulary beside `<pad>`, `<bos>`, `<eos>`, `<unk>`, `<turn>`, `</turn>`,
        `user`, `assistant` and `system`.
      bos: whether raw text begins with `<bos>`.
    """
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<turn>", "</turn>"]
    tokens = [*special, "user", "assistant", "system", *words]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>", "</turn>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
