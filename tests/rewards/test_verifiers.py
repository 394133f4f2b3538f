r"""Final answers: where they stand in a text, and when two of them are the same."""

import string

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from iro_jax.data import Prompt
from iro_jax.rewards import (
    ExactMatch,
    TextAnswer,
    boxed_answer,
    gsm8k_answer,
    last_number,
    normalise_answer,
    worked_answer,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so it is $\boxed{42}$.", "42"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {\text{a {b} c}} then }", r"\text{a {b} c}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{2", None),
        (r"\boxed{}", ""),
        ("42", None),
        ("", None),
    ],
)
def test_boxed_answers(text, found):
    assert boxed_answer(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### 1,234\nand so on", "1,234"),
        ("#### 1\n#### -2.5 ", "-2.5"),
        ("####", None),
        ("It is 72.", None),
    ],
)
def test_gsm8k_answers(text, found):
    assert gsm8k_answer(text) == found


def test_the_last_number_may_stand_in():
    assert gsm8k_answer("It is 71 or 72.", or_last_number=True) == "72"
    assert gsm8k_answer("#### 71\nThat is 72.", or_last_number=True) == "71"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from 3 to 1,234.50 dollars.", "1,234.50"),
        ("costs $20, or so", "$20"),
        ("from 5-7", "7"),
        ("is -7.", "-7"),
        ("is \u22127.", "\u22127"),
        (".5", ".5"),
        ("50% more", "50%"),
        ("half is 1/2.", "1/2"),
        ("1,080", "1,080"),
        ("10,20", "20"),
        ("the B2 form", None),
        ("none", None),
    ],
)
def test_last_numbers(text, found):
    assert last_number(text) == found


SAME = [
    ["1234", "1,234", "$1,234", r"\$1,234.00", "1234.", " 1234 ", r"1{,}234", r"1,\!234", "+1234"],
    ["1/2", ".5", "0.50", r"\frac12", r"\frac{1}{2}", r"\dfrac 1 2", r"\frac{2}{4}", "2 / 4"],
    ["-1/2", r"-\frac{1}{2}", r"\frac{-1}{2}", r"\frac{1}{-2}", "-.5", "\u22120.5"],
    ["50", "50%", r"50\%", "50 percent", "50.0"],
    ["9/5", r"1\frac{4}{5}", r"1 \frac45", "1 4/5", "1.8"],
    ["5", r"5\text{ cm}", r"5 \mbox{ cm}^2", "5 cm", "5 square feet", "5 km/h", "$5 per hour"],
    ["90", r"90^\circ", r"90^{\circ}", "90°", "90 degrees"],
    ["5", "x = 5", "x=5", "$x=5$."],
    [r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", r"(3.0, \frac \pi 2)"],
    ["(1/2,-3]", r"\left(\frac{1}{2}, -3\right]", "(0.5, -3.0]"],
    ["1,-2", "1, -2", "1.0,-2"],
    ["Evelyn", r"\text{Evelyn}", r"\textbf{Evelyn}.", r"\text{\textbf{Evelyn}}"],
    ["C", "(C)", r"\text{(C)}", r"\textbf{(C)}"],
    [r"11\sqrt2", r"11 \sqrt{2}", r"11\sqrt 2"],
    ["52_8", "52_{8}"],
    [r"\cot x", r"\cot  x"],
    [
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
        r"\begin{pmatrix}-1/3\\2/3\end{pmatrix}",
    ],
    ["p-q", "p - q"],
]


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_answer(spellings):
    assert len({normalise_answer(spelling) for spelling in spellings}) == 1
    once = normalise_answer(spellings[0])
    assert normalise_answer(once) == once


def test_different_answers_stay_different():
    different = [min(spellings) for spellings in SAME if spellings[0] != "5"]
    different += [
        "5",
        "5 or 6",
        "0.333",
        "1/3",
        "1,2,3",
        "123",
        "(1,234)",
        "2 million",
        "2",
        "3 pi",
    ]
    different += [r"2\sqrt{2}", r"\sqrt{8}", "52", "x+1", "x-1", "(1,3)", "[1,3]", "1/0", "A"]
    assert len({normalise_answer(answer) for answer in different}) == len(different)


def test_what_says_nothing_is_empty():
    assert [normalise_answer(text) for text in ("", " ", ".", "$$", r"\left.")] == [""] * 5


@given(
    st.text(string.ascii_letters + string.digits + r" \\{}{}()[]$%,./^_-+=" + "\n", max_size=60)
    | st.text(max_size=30)
)
@example("9" * 5000)
@example("9" * 400 + "/" + "9" * 50)
@example(r"\frac{" * 2000)
@example(r"\frac{" * 80)
@example(r"\frac1" * 80)
@example("(" * 250 + "1,2" + ")" * 240)
def test_nothing_a_model_writes_is_an_error(text):
    normalise_answer(text)
    for extract in (boxed_answer, gsm8k_answer, last_number):
        assert extract(text) is None or extract(text) in text


class TestExactMatch:
    @pytest.mark.parametrize(
        "reference", ["72", 72, 72.0, "72.00", r"thus \boxed{72}", r"\dfrac{144}{2}"]
    )
    def test_of_boxed_answers(self, reference):
        texts = [r"\boxed{72}", r"\boxed{\$72.0}", r"\boxed{71}", "72", r"\boxed{}"]
        prompts = [Prompt("p", "question", reference)] * len(texts)
        rewards = ExactMatch()(prompts, [TextAnswer(text) for text in texts])
        np.testing.assert_array_equal(rewards, [1, 1, 0, 0, 0])
        assert rewards.dtype == np.float32

    def test_of_gsm8k_with_the_worked_solution_as_reference(self):
        prompt = Prompt("p", "question", "He has 1000+234 = 1234.\n#### 1,234")
        texts = ["#### 1234", "#### $1,234.00", "1234", "#### 12"]
        rewards = ExactMatch(gsm8k_answer)([prompt] * 4, [TextAnswer(text) for text in texts])
        np.testing.assert_array_equal(rewards, [1, 1, 0, 0])

    def test_votes_are_the_same_for_the_same_answer(self):
        vote = ExactMatch().vote
        assert vote(r"\boxed{0.5}") == vote(r"\boxed{\frac12}") == "1/2"
        assert vote("nothing") is None
        assert vote(r"\boxed{}") is None

    @pytest.mark.parametrize("reference", [None, ["72"], {"answer": 72}, True, " "])
    def test_a_prompt_needs_a_reference(self, reference):
        with pytest.raises(ValueError, match=r"Prompt 'p': the reference .*Got: "):
            ExactMatch()([Prompt("p", "question", reference)], [TextAnswer("72")])


@pytest.mark.parametrize(
    ("reference", "text", "reward"),
    [
        ("48/2 = 24\n24+48 = 72\n#### 72", "so \\boxed{72}", 1.0),
        ("48/2 = 24\n24+48 = 72\n#### 72", "so \\boxed{24}", 0.0),
        ("48/2 = 24\n24+48 = 72\n#### 72", "72", 0.0),
        ("thus \\boxed{p - q}", "\\boxed{p-q}", 1.0),
        ("p - q", "\\boxed{p-q}", 1.0),
    ],
)
def test_worked_solutions_may_be_written_otherwise_than_answers(reference, text, reward):
    boxed = ExactMatch(boxed_answer, extract_reference=worked_answer)
    assert boxed([Prompt("a", "x", reference)], [TextAnswer(text)]) == [reward]
