"""Tokenizers described by GGUF metadata, on vocabularies small enough to check by hand."""

from pathlib import Path

import pytest

from iro_jax.models import CheckpointError
from iro_jax.models.weights.gguf_tokenizer import build_tokenizer

LETTERS = [chr(code) for code in range(33, 127)]
BYTE_LEVEL = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [*LETTERS, "\u0120", "he", "12", "123", "<s>", "</s>", "<think>"],
    "tokenizer.ggml.token_type": [1] * 98 + [3, 3, 4],
    "tokenizer.ggml.merges": ["h e", "1 2", "12 3"],
    "tokenizer.ggml.bos_token_id": 98,
    "tokenizer.ggml.eos_token_id": 99,
}
SENTENCEPIECE = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "\u2581", "h", "e", "he", "\u2581he"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -2.0, -1.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def build(metadata, **changes):
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return build_tokenizer(changed, Path("model.gguf"))


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("gpt-2", ["he", "\u0120", "123", "12"]),
        ("smollm", ["he", "\u0120", "1", "2", "3", "1", "2"]),
        ("llama-bpe", ["he", "\u0120", "123", "12"]),
        ("qwen2", ["he", "\u0120", "1", "2", "3", "1", "2"]),
    ],
)
def test_words_are_cut_as_the_vocabulary_was_learned(rule, expected):
    tokenizer = build(BYTE_LEVEL, pre=rule)
    assert pieces(tokenizer, "he 12312") == expected
    assert tokenizer.decode(tokenizer("he 12312")["input_ids"]) == "he 12312"


@pytest.mark.parametrize("metadata", [BYTE_LEVEL, SENTENCEPIECE], ids=["gpt2", "llama"])
def test_bos_is_added_when_the_file_says_so(metadata, tmp_path):
    begins = build(metadata, add_bos_token=True)
    assert pieces(begins, "he")[0] == "<s>"
    assert pieces(build(metadata, add_bos_token=False), "he")[0] != "<s>"
    begins.save_pretrained(tmp_path)
    import transformers

    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("he")["input_ids"] == begins("he")["input_ids"]


def test_qwen_composes_characters():
    letters = BYTE_LEVEL["tokenizer.ggml.tokens"] + ["\u00c3", "\u00a9", "\u00cc", "\u0123"]
    types = BYTE_LEVEL["tokenizer.ggml.token_type"] + [1] * 4
    tokenizer = build(BYTE_LEVEL, pre="qwen2", tokens=letters, token_type=types)
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"] == [101, 102]


def test_control_and_user_defined_tokens_stay_whole():
    tokenizer = build(BYTE_LEVEL)
    ids = tokenizer("<think>he</s>")["input_ids"]
    assert ids == [100, 95, 99]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>he"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (98, 99)


def test_sentencepiece_merges_follow_from_the_scores():
    assert pieces(build(SENTENCEPIECE), "he hhe") == ["<s>", "\u2581he", "\u2581", "h", "he"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model must be 'gpt2' or 'llama'. Got: 'bert'"),
        ({"pre": "klingon"}, r"tokenizer.ggml.pre must be one of .* Got: 'klingon'"),
    ],
)
def test_unknown_kinds(changes, message):
    with pytest.raises(CheckpointError, match=message):
        build(BYTE_LEVEL, **changes)
