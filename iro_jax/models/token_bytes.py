"""The bytes that each token of a vocabulary stands for.

Stop strings and other tokenizers look at text while it is being sampled, a token at a time;
a token may be part of a character. Three kinds of tokenizers are understood: byte-level BPE
(GPT-2 and its heirs), SentencePiece with byte fallback (Llama 2, Mistral, Gemma), and plain
vocabularies of words and word pieces. Special tokens stand for nothing, as in text that is
decoded with `skip_special_tokens=True`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Set
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
_SENTENCEPIECE_STEPS = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[bytes, ...]:
    """The bytes of tokens 0 to `vocab_size - 1`; none for those that do not exist.

    A plain vocabulary's tokens are joined by spaces, which one token cannot tell from the
    beginning of the text: all but the continuations of words get a space in front. Those of
    SentencePiece bring it with them. Either way, the text may have one in front as well.

    Raises:
      ValueError: the tokenizer is of another kind.
    """
    convert = _converter(tokenizer)
    special = {index for index, t in tokenizer.added_tokens_decoder.items() if t.special}
    special.update(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
    return tuple(
        b"" if token is None or index in special else convert(token)
        for index, token in enumerate(tokens)
    )


def _converter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """What turns a token, as the vocabulary spells it, into bytes."""
    if not tokenizer.is_fast:
        raise ValueError(f"Only fast tokenizers are understood. Got: {type(tokenizer).__name__}")
    backend = tokenizer.backend_tokenizer
    pre_tokenizers = _steps(backend.pre_tokenizer, "pretokenizers")
    decoders = _steps(backend.decoder, "decoders")
    if "ByteLevel" in decoders | pre_tokenizers:
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        return functools.partial(_byte_level, added=added)
    if "WordPiece" in decoders:
        return functools.partial(_word_piece, prefix=decoders["WordPiece"]["prefix"])
    if not decoders:
        return lambda token: f" {token}".encode()
    if decoders.keys() <= _SENTENCEPIECE_STEPS:
        return functools.partial(_sentencepiece, byte_fallback="ByteFallback" in decoders)
    raise ValueError(f"Tokenizers that decode by {list(decoders)} are not understood")


def _steps(part: Any, key: str) -> dict[str, dict[str, Any]]:
    """The settings of a decoder's or pre-tokenizer's steps by their type."""
    if part is None:
        return {}
    settings = json.loads(part.__getstate__())
    return {step["type"]: step for step in settings.get(key, [settings])}


def _byte_level(token: str, *, added: Set[str]) -> bytes:
    alphabet = _byte_alphabet()
    if token in added or not alphabet.keys() >= set(token):
        return token.encode()
    return bytes(alphabet[stand_in] for stand_in in token)


def _word_piece(token: str, *, prefix: str) -> bytes:
    return (token.removeprefix(prefix) if token.startswith(prefix) else f" {token}").encode()


def _sentencepiece(token: str, *, byte_fallback: bool) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
    return bytes.fromhex(byte[1]) if byte else token.replace(_SPACE, " ").encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in printable)
    alphabet.update((chr(256 + i), byte) for i, byte in enumerate(rest))
    return alphabet
