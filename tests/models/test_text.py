"""One conversation, one sequence of tokens: templates, BOS, truncation, buckets."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from iro_jax.models import TextFormat, bucket_length, pad_prompts, render
from iro_jax.testing import word_tokenizer

WORDS = [*"abcdefghijklmnopqrstuvwxyz"]
PLAIN = word_tokenizer(WORDS)
BEGINS = word_tokenizer(WORDS, bos=True)


def words(tokenizer, *args, **kwargs):
    return " ".join(tokenizer.convert_ids_to_tokens(render(tokenizer, *args, **kwargs)))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def test_raw_prompts_follow_the_tokenizer():
    assert words(PLAIN, "a b c") == "a b c"
    assert words(BEGINS, "a b c") == "<bos> a b c"
    assert render(PLAIN, "a").dtype == np.int32


def test_conversations_follow_the_template_up_to_the_answer():
    assert words(PLAIN, [user("a b")]) == "<turn> user a b </turn> <turn> assistant"
    assert words(BEGINS, [user("a b")]) == "<turn> user a b </turn> <turn> assistant"


def test_an_answer_is_what_the_model_would_have_sampled():
    prompt = "<turn> user a </turn> <turn> assistant"
    assert words(PLAIN, [user("a")], answer="b c") == f"{prompt} b c </turn>"
    assert words(PLAIN, [user("a")], answer="b c", finished=False) == f"{prompt} b c"
    assert words(PLAIN, [user("a"), assistant("b c")]) == f"{prompt} b c </turn>"
    assert words(BEGINS, "a", answer="b") == "<bos> a b <eos>"


@pytest.mark.parametrize(
    ("bos", "raw", "chat"),
    [
        ("auto", "<bos> a", "<turn> user a </turn> <turn> assistant"),
        ("always", "<bos> a", "<bos> <turn> user a </turn> <turn> assistant"),
        ("never", "a", "<turn> user a </turn> <turn> assistant"),
    ],
)
def test_bos_rules(bos, raw, chat):
    text_format = TextFormat(bos=bos)
    assert words(BEGINS, "a", text_format=text_format) == raw
    assert words(BEGINS, "<bos> a", text_format=text_format) == raw
    assert words(BEGINS, [user("a")], text_format=text_format) == chat


def test_a_template_that_writes_bos_gets_one():
    tokenizer = word_tokenizer(WORDS, bos=True)
    tokenizer.chat_template = "<bos> " + tokenizer.chat_template
    assert words(tokenizer, [user("a")]).count("<bos>") == 1
    never = words(tokenizer, [user("a")], text_format=TextFormat(bos="never"))
    assert never == "<turn> user a </turn> <turn> assistant"


@pytest.mark.parametrize(
    ("truncation", "raw", "chat"),
    [
        ("left", "<bos> d e", "<turn> user d e </turn> <turn> assistant"),
        ("right", "<bos> a b", "<turn> user a b </turn> <turn> assistant"),
    ],
)
def test_truncation_keeps_bos_and_template(truncation, raw, chat):
    short = TextFormat(max_length=3, truncation=truncation)
    assert words(BEGINS, "a b c d e", text_format=short) == raw
    short = TextFormat(max_length=7, truncation=truncation)
    assert words(BEGINS, [user("a b c d e")], text_format=short) == chat


def test_truncation_takes_old_text_first_and_spares_the_system():
    talk = [system("s t"), user("a b"), assistant("c d"), user("e f")]
    left = words(PLAIN, talk, text_format=TextFormat(max_length=19, truncation="left"))
    assert "s t" in left
    assert "user </turn>" in left
    assert "assistant d </turn>" in left
    assert "e f" in left
    right = words(PLAIN, talk, text_format=TextFormat(max_length=21, truncation="right"))
    assert "a b" in right
    assert right.endswith("user e </turn> <turn> assistant")


def test_a_prompt_is_cut_the_same_with_and_without_its_answer():
    limit = TextFormat(max_length=6, truncation="left")
    prompt = words(PLAIN, [user("a b c")], text_format=limit)
    assert prompt == "<turn> user c </turn> <turn> assistant"
    assert words(PLAIN, [user("a b c")], answer="x y", text_format=limit) == f"{prompt} x y </turn>"


def test_a_sampled_answer_is_taken_as_it_is():
    sampled = render(PLAIN, "x y z")
    whole = render(PLAIN, [user("a")], answer=sampled.tolist())
    np.testing.assert_array_equal(whole, [*render(PLAIN, [user("a")]), *sampled])


def test_the_end_of_a_turn_is_found_after_a_round_trip(tmp_path):
    """Published tokenizers mark it special only where added tokens are listed."""
    import json

    import transformers

    PLAIN.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for field in ("additional_special_tokens", "extra_special_tokens"):
        settings.pop(field, None)
    path.write_text(json.dumps(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert words(tokenizer, [user("a")], answer="b").endswith("b </turn>")


def test_bos_that_begins_every_turn_belongs_to_the_template():
    tokenizer = word_tokenizer(WORDS, bos=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<turn>", "<bos>")
    never = words(tokenizer, [user("a")], text_format=TextFormat(bos="never"))
    assert never == "<bos> user a </turn> <bos> assistant"


@hypothesis.given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=40),
    st.integers(6, 50),
    st.sampled_from(["left", "right"]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_truncated_conversations_fit_exactly(content, limit, truncation):
    text_format = TextFormat(max_length=limit, truncation=truncation)
    ids = render(PLAIN, [user(" ".join(content))], text_format=text_format)
    assert len(ids) == min(len(content) + 5, limit)


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        ("", {}, "The prompt is empty"),
        (" ", {}, "The prompt is empty: it has no tokens"),
        (iter([user("a")]), {}, "A prompt is text or a list of messages"),
        ([user(" ")], {}, "its last message has no content"),
        (
            [user("a b c d"), user("e f")],
            {"text_format": TextFormat(max_length=10, truncation="right")},
            "no room for the last message",
        ),
        ([], {}, "The prompt is empty: it has no messages"),
        ([user("")], {}, "its last message has no content"),
        ([{"role": "user"}], {}, "Message 0 must have a role and a content"),
        ([user("a"), {"role": "user", "content": 3}], {}, "Message 1 must have"),
        (["a"], {}, "Message 0 must have"),
        ("a b c", {"text_format": TextFormat(max_length=2)}, r"longer than the 2 tokens.*Got: 3"),
        ([user("a")], {"text_format": TextFormat(max_length=2)}, r"longer than the 2 tokens"),
        (
            [user("a b")],
            {"text_format": TextFormat(max_length=5, truncation="left")},
            "no room for the last message",
        ),
        ([user("a"), assistant("b")], {"answer": "c"}, "has an answer already"),
    ],
)
def test_errors(conversation, options, message):
    with pytest.raises(ValueError, match=message):
        render(PLAIN, conversation, **options)


def test_no_chat_template():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: pass the prompt as text"):
        render(tokenizer, [user("a")])


def test_a_template_that_refuses():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"refuses roles \['system', 'user'\]: no system role"):
        render(tokenizer, [system("a"), user("b")])


@pytest.mark.parametrize(
    "options", [{"max_length": 0}, {"truncation": "middle"}, {"bos": "sometimes"}]
)
def test_bad_formats(options):
    with pytest.raises(ValueError, match="Got: "):
        TextFormat(**options)


def test_buckets_are_few():
    assert [bucket_length(n) for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]
    assert len({bucket_length(n) for n in range(1, 4097)}) == 8


def test_batches_are_padded_on_the_right():
    batch = pad_prompts([np.array([5, 6, 7]), np.array([8])], length=4, rows=3)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.mask.sum(1), [3, 1, 1])
    assert pad_prompts([np.arange(40)]).tokens.shape == (1, 64)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([np.array([], int)], {}, "A prompt is empty"),
        ([np.arange(9)], {"length": 8}, "do not fit"),
        ([np.arange(2)] * 3, {"rows": 2}, "do not fit"),
    ],
)
def test_bad_batches(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        pad_prompts(prompts, **options)


@pytest.mark.slow
def test_smollm2_sees_its_own_template(smollm2):
    tokenizer = smollm2.tokenizer
    talk = [user("Hi there"), assistant("Hello!"), user("Bye")]
    ids = render(tokenizer, talk)
    assert ids.tolist() == tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False
    )
    answered = render(tokenizer, talk, answer="See you")
    assert tokenizer.decode(answered[len(ids) :]) == "See you<|im_end|>"
    assert answered[-1] in smollm2.eos_ids
