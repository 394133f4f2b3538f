"""Format constraints: what satisfies them, how they are asked for, and what they reward."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iro_jax.data import Prompt
from iro_jax.rewards import KINDS, Constraint, ConstraintReward, TextAnswer, check, describe
from iro_jax.rewards.counting import count_paragraphs, count_sentences, count_words

EXAMPLES = [
    ({"kind": "no_commas"}, ["One two."], ["One, two.", "1,000"]),
    ({"kind": "lower_case"}, ["all small, 1.", "é"], ["Not all", "123", "!"]),
    ({"kind": "upper_case"}, ["LOUD, 1."], ["LOUd", "123"]),
    (
        {"kind": "quotation"},
        ['"Yes."', '"A "b" c"', "“Oui”", ' "x" \n'],
        ['"Yes', "Yes", '"', '""'],
    ),
    (
        {"kind": "json"},
        ['{"a": [1, null]}', "[]", '```json\n{"a": 1}\n```', "```\n[1]\n```"],
        ["{a: 1}", "5", '"text"', "[NaN]", '{"a": 1} yes', "[" * 100_000],
    ),
    ({"kind": "title"}, ["<<A title>>\nText"], ["<A title>", "<< >>", "<<a\nb>>"]),
    (
        {"kind": "words", "relation": "exactly", "count": 3},
        ["one two three", "don't - well-known; x"],
        ["one two", "one two three four"],
    ),
    (
        {"kind": "words", "relation": "at most", "count": 2},
        ["one", "one two"],
        ["one two three", ""],
    ),
    (
        {"kind": "sentences", "relation": "at least", "count": 2},
        ["One. Two!", "One\nTwo", "Really?! Yes... so"],
        ["One.", "Dr. Who", "3.14 is it"],
    ),
    (
        {"kind": "paragraphs", "relation": "exactly", "count": 2},
        ["One\nstill one\n\nTwo", "One\n \n\n\nTwo\n\n", "One\r\n\r\nTwo"],
        ["One\nTwo", "One\n\nTwo\n\nThree"],
    ),
    (
        {"kind": "bullets", "relation": "exactly", "count": 2},
        ["List:\n* one\n* two", "- one\n  - two", "• one\n+ two"],
        ["* one", "*one\n*two", "one - two\nthree - four", "* one\n* \n", "---\n- one\n- two\n- x"],
    ),
    (
        {"kind": "placeholders", "relation": "at least", "count": 2},
        ["Dear [name] of [city]"],
        ["Dear [name]", "[] [ ]", "[[name]]"],
    ),
    (
        {"kind": "capital_words", "relation": "at most", "count": 1},
        ["Only ONE here", "none"],
        ["TWO HERE", "I AM"],
    ),
    (
        {"kind": "keyword", "keyword": "Sea", "relation": "at least", "count": 2},
        ["the sea, the SEA", "sea-sea"],
        ["the sea", "the seal, the seas, the sea"],
    ),
    (
        {"kind": "keyword", "keyword": "open sea", "relation": "exactly", "count": 1},
        ["the open\nsea"],
        ["open the sea", "open sea open sea"],
    ),
    (
        {"kind": "keyword", "keyword": "C++", "relation": "at least", "count": 1},
        ["in c++."],
        ["in C"],
    ),
    (
        {"kind": "forbidden_words", "words": ["bad", "ugly"]},
        ["good", "badly"],
        ["so BAD", "ugly!"],
    ),
    (
        {"kind": "starts_with", "phrase": "Dear sir"},
        ["Dear Sir, hello", "  dear sir"],
        ["Dear sirs", "Oh dear sir"],
    ),
    (
        {"kind": "ends_with", "phrase": "the end."},
        ["This is The End.", "the end. \n"],
        ["the end", "the end. No", "bathe end."],
    ),
]
CASES = [
    pytest.param(constraint, text, expected, id=f"{constraint['kind']}-{text[:20]!r}")
    for constraint, good, bad in EXAMPLES
    for expected, texts in ((True, good), (False, bad))
    for text in texts
]


@pytest.mark.parametrize(("constraint", "text", "expected"), CASES)
def test_what_satisfies_a_constraint(constraint, text, expected):
    assert check(Constraint.from_json(constraint), text) is expected


def test_every_kind_has_an_example():
    assert {constraint["kind"] for constraint, _, _ in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize("constraint", [constraint for constraint, _, _ in EXAMPLES])
def test_nothing_satisfies_nothing(constraint):
    assert not check(Constraint.from_json(constraint), "")
    assert not check(Constraint.from_json(constraint), " \n")


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_answer_does_not_even_avoid_things(count):
    for kind in ("words", "sentences", "bullets"):
        assert not check(Constraint(kind, {"relation": "at most", "count": count}), " ")


@given(st.text(max_size=80))
def test_any_text_can_be_checked(text):
    for constraint, _, _ in EXAMPLES:
        check(Constraint.from_json(constraint), text)


@given(st.lists(st.sampled_from(["It rained", "He left (late)", 'She said "no"']), min_size=1))
def test_as_many_sentences_as_were_written(sentences):
    assert count_sentences(" ".join(f"{sentence}." for sentence in sentences)) == len(sentences)
    assert count_sentences("\n".join(sentences)) == len(sentences)
    assert count_paragraphs("\n\n".join(sentences)) == len(sentences)
    assert count_words(" ".join(sentences)) == sum(len(s.split()) for s in sentences)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Dr. Smith met J. K. Rowling. They talked!", 2),
        ("In the U.S. it costs 3.14 dollars.", 1),
        ("1. First do this.\n2. Then that.", 2),
        ('He said "Stop." Then he left.', 2),
        ("wait... what?!", 2),
        ("E.g. this. And i.e. that.", 2),
        ("It was I. He left.", 2),
        ("no capitals here. none at all", 2),
        ("...", 0),
        ("A heading\n\nAnd its text.", 2),
    ],
)
def test_where_sentences_end(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        ({"kind": "no_commas"}, "Do not use any commas in your answer."),
        (
            {"kind": "sentences", "relation": "at least", "count": 2},
            "Your answer must have at least 2 sentences.",
        ),
        (
            {"kind": "words", "relation": "exactly", "count": 1},
            "Your answer must have exactly 1 word.",
        ),
        (
            {"kind": "keyword", "keyword": "sea", "relation": "at least", "count": 1},
            'Use the word "sea" at least once in your answer.',
        ),
        (
            {"kind": "forbidden_words", "words": ["a", "b", "c"]},
            'Do not use the words "a", "b" or "c" in your answer.',
        ),
    ],
)
def test_how_a_constraint_is_asked_for(constraint, sentence):
    assert describe(Constraint.from_json(constraint)) == sentence


@pytest.mark.parametrize("constraint", [constraint for constraint, _, _ in EXAMPLES])
def test_constraints_are_json_and_can_be_told(constraint):
    read = Constraint.from_json(json.loads(json.dumps(constraint)))
    assert read.to_json() == constraint
    assert describe(read)[0].isupper()
    assert all(str(value) in describe(read) for value in constraint.values() if value in (2, 3))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"kind": "no_comma"}, r"one of \['bullets', .*Got: 'no_comma'"),
        ({"kind": ["json"]}, r"Got: \['json'\]"),
        ("no_commas", "object with a 'kind'"),
        ({"count": 3}, "object with a 'kind'"),
        ({"kind": "words", "count": 3}, r"'words' has the arguments \['count', 'relation'\]"),
        ({"kind": "json", "count": 3}, r"'json' has the arguments \[\]\. Got: \['count'\]"),
        (
            {"kind": "words", "relation": "more than", "count": 3},
            r"'relation' of a constraint 'words' must be one of .*'at least'.*Got: 'more than'",
        ),
        ({"kind": "words", "relation": "exactly", "count": "3"}, r"'count' .*whole number.*'3'"),
        ({"kind": "words", "relation": "exactly", "count": True}, "'count' .*whole number"),
        ({"kind": "words", "relation": "exactly", "count": -1}, "'count' .*0 or more"),
        ({"kind": "starts_with", "phrase": " "}, "'phrase' .*not empty"),
        ({"kind": "forbidden_words", "words": "bad"}, "'words' .*list of texts"),
        ({"kind": "forbidden_words", "words": []}, "'words' .*list of texts"),
    ],
)
def test_broken_constraints(broken, message):
    with pytest.raises(ValueError, match=message):
        Constraint.from_json(broken)
    with pytest.raises(ValueError, match=r"Prompt 'p': "):
        ConstraintReward()([Prompt("p", "x", [broken])], [TextAnswer("text")])


class TestConstraintReward:
    REFERENCE = ({"kind": "no_commas"}, {"kind": "lower_case"})

    def test_all_must_hold(self):
        prompts = [Prompt("p", "x", list(self.REFERENCE))] * 4
        answers = [TextAnswer(text) for text in ("yes", "Yes", "Yes, sir", "")]
        np.testing.assert_array_equal(ConstraintReward()(prompts, answers), [1, 0, 0, 0])
        shares = ConstraintReward(share=True)(prompts, answers)
        np.testing.assert_array_equal(shares, [1, 0.5, 0, 0])

    def test_a_single_constraint_needs_no_list(self):
        prompt = Prompt("p", "x", self.REFERENCE[0])
        assert ConstraintReward()([prompt], [TextAnswer("Yes")]) == 1

    @pytest.mark.parametrize("reference", [None, []])
    def test_a_prompt_needs_constraints(self, reference):
        with pytest.raises(ValueError, match="Prompt 'p': "):
            ConstraintReward()([Prompt("p", "x", reference)], [TextAnswer("Yes")])
