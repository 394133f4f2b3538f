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

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[bytes, ...]:
    """The bytes of tokens 0 to `vocab_size - 1`; none for those that do not exist.

    A word-level tokenizer joins its tokens by spaces, which this cannot know: its tokens get
    a space in front, and so does the text.
    """
    added = tokenizer.added_tokens_decoder
    special = {index for index, token in added.items() if token.special}
    special.update(tokenizer.all_special_ids)
    convert = _converter(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    table = []
    for index, token in enumerate(tokens):
        if index in special or token is None:
            table.append(b"")
        elif index in added:
            table.append(token.encode())
        else:
            table.append(convert(token))
    return tuple(table) + (b"",) * (vocab_size - len(table))


def _converter(tokenizer: PreTrainedTokenizerBase):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decoders = _steps(backend.get("decoder"), "decoders")
    pre_tokenizers = _steps(backend.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in decoders + pre_tokenizers):
        alphabet = _byte_alphabet()
        return lambda token: bytes(alphabet[c] for c in token if c in alphabet)
    if any(step["type"] == "WordPiece" for step in decoders):
        return lambda token: (token[2:] if token.startswith("##") else " " + token).encode()
    if not decoders:
        return lambda token: (" " + token).encode()

    def sentence_piece(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes([int(byte.group(1), 16)])
        return token.replace(_SPACE, " ").encode()

    return sentence_piece


def _steps(part: dict | None, key: str) -> list[dict]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in printable)
    alphabet.update((chr(256 + i), byte) for i, byte in enumerate(rest))
    return alphabet
