"""The tokenizer that a GGUF file describes, as one of `transformers`' own.

GGUF names a kind of vocabulary (`gpt2`, byte-level BPE; `llama`, SentencePiece BPE) and the
rule that cuts text into words before merging. Sentencepiece files carry no merges: those
follow from the vocabulary, since every token was once the best merge of two others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from iro_jax.models.weights.checkpoint import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4

# Word boundaries by `tokenizer.ggml.pre`; the vocabularies were learned with these.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}",
}
_WORDS |= {"llama3": _WORDS["llama-bpe"], "llama-v3": _WORDS["llama-bpe"]}
_SINGLE_DIGITS = ("smollm",)
_PLAIN_BYTE_LEVEL = ("gpt-2", "default", "olmo", "gptneox")


def build_tokenizer(metadata: Mapping[str, Any], origin: Path) -> PreTrainedTokenizerBase:
    """Builds the tokenizer from `tokenizer.*` metadata.

    Raises:
      CheckpointError: the kind of vocabulary or the word rule is not known.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    special = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer: PreTrainedTokenizerBase = _byte_level(metadata, tokens, special, origin)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, special)
    else:
        raise CheckpointError(
            f"{origin}: tokenizer.ggml.model must be 'gpt2' or 'llama'. Got: {kind!r}"
        )
    _add_unsplit_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], special: Mapping[str, str], origin: Path
) -> PreTrainedTokenizerBase:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in _WORDS)
    if rule in _WORDS:
        words = pre_tokenizers.Split(Regex(_WORDS[rule]), behavior="isolated")
        splitter: pre_tokenizers.PreTokenizer = pre_tokenizers.Sequence([words, byte_level])
    elif rule in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        splitter = pre_tokenizers.Sequence([digits, byte_level])
    elif rule in _PLAIN_BYTE_LEVEL:
        splitter = byte_level
    else:
        known = sorted((*_WORDS, *_SINGLE_DIGITS, *_PLAIN_BYTE_LEVEL))
        raise CheckpointError(f"{origin}: tokenizer.ggml.pre must be one of {known}. Got: {rule!r}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in _WORDS))
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    if metadata.get("tokenizer.ggml.add_bos_token"):
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], special: Mapping[str, str]
) -> PreTrainedTokenizerBase:
    gemma = metadata["general.architecture"].startswith("gemma")
    if gemma:
        # Runs of spaces are stored as they look; the vocabulary has them as U+2581. Gemma's
        # scores do not follow its merges, the order of its tokens does.
        tokens = [t.replace(" ", "\u2581") if t and not t.strip(" ") else t for t in tokens]
        rank = {token: index for index, token in enumerate(tokens)}
    else:
        scores = metadata["tokenizer.ggml.scores"]
        rank = {token: -score for token, score in zip(tokens, scores, strict=True)}
    vocabulary = {token: index for index, token in enumerate(tokens)}
    constructor = GemmaTokenizer if gemma else LlamaTokenizer
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", not gemma)
    options = {} if gemma else {"add_prefix_space": prefix}
    return constructor(
        vocab=vocabulary,
        merges=_implied_merges(vocabulary, rank),
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", True),
        **options,
        **special,
    )


def _implied_merges(
    vocabulary: Mapping[str, int], rank: Mapping[str, float]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best result first."""
    merges = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                key = (rank[token], index, vocabulary[left], vocabulary[right])
                merges.append((key, (left, right)))
    return [pair for _, pair in sorted(merges)]


def _add_unsplit_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], types: Sequence[int]
) -> None:
    """Marks control tokens as special, and user-defined ones as never to be cut."""

    vocabulary = tokenizer.get_vocab()

    def added(kind: int) -> list[AddedToken]:
        return [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, token_type in zip(tokens, types, strict=False)
            if token_type == kind and token in vocabulary
        ]

    tokenizer.add_special_tokens(
        {"additional_special_tokens": added(_CONTROL)}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens(added(_USER_DEFINED))
