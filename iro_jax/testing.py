"""A dummy model and tokenizers small enough that a test runs in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from iro_jax.models.config import Layer, TransformerConfig
from iro_jax.models.network import Network
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
