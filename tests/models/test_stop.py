"""Stop strings found token by token, against a search of the joined bytes."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from iro_jax.models.stop import START, STOPPED, cut, stop_table
from iro_jax.models.token_bytes import token_bytes

# Few letters, so that stop strings overlap; two begin with the same byte.
LETTERS = "abéè"
STOP_STRINGS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)
BYTES = st.lists(st.sampled_from(sorted(set(LETTERS.encode()))), max_size=6).map(bytes)


def walk(table, tokens):
    """The state after every token."""
    states, state = [], START
    for token in tokens:
        state = table[state, token]
        states.append(state)
    return np.array(states, int)


@hypothesis.given(STOP_STRINGS, st.lists(BYTES, min_size=1, max_size=8), st.data())
@hypothesis.settings(max_examples=400, deadline=None)
def test_a_text_stops_with_the_first_token_that_completes_a_stop_string(stops, vocabulary, data):
    tokens = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=12))
    texts = [b"".join(vocabulary[t] for t in tokens[: n + 1]) for n in range(len(tokens))]
    stopped = [any(stop.encode() in text for stop in stops) for text in texts]
    states = walk(stop_table(stops, vocabulary), tokens)
    np.testing.assert_array_equal(states == STOPPED, stopped)


@pytest.mark.parametrize(
    ("stops", "pieces", "stopped_after"),
    [
        pytest.param(["ab"], ["a", "xaab!!", "y"], 2, id="in the middle of a token"),
        pytest.param(["<stop>"], ["a<", "st", "op", ">", "a"], 4, id="over several tokens"),
        pytest.param([";", ".", "b.c"], ["a", "a;b.c"], 2, id="several within one token"),
        pytest.param(["aab"], ["a", "a", "a", "b"], 4, id="repeated letters"),
        pytest.param(["aabaaab"], ["aabaa", "baa", "ab"], 3, id="falls back on its own prefix"),
        pytest.param(["abc", "b"], ["a", "b", "c"], 2, id="one inside another"),
        pytest.param(["abc", "bc"], ["ab", "c"], 2, id="one ends another"),
        pytest.param(["abc", "ab"], ["a", "b", "c"], 2, id="one begins another"),
        pytest.param(["abd", "bce"], ["ab", "c", "e"], 3, id="falls back on another"),
        pytest.param(["ab", "ab"], ["a", "b"], 2, id="twice the same"),
        pytest.param(["ab"], ["a", "", "b"], 3, id="special tokens in between"),
        pytest.param(["ab"], ["a", "c", "b"], np.inf, id="interrupted"),
    ],
)
def test_places_of_stop_strings(stops, pieces, stopped_after):
    table = stop_table(stops, [piece.encode() for piece in pieces])
    states = walk(table, range(len(pieces)))
    read = np.arange(1, len(pieces) + 1)
    np.testing.assert_array_equal(states == STOPPED, read >= stopped_after)


def test_a_character_may_be_spread_over_tokens():
    lead, acute, grave = b"\xc3", b"\xa9", b"\xa8"
    table = stop_table(["é"], [lead, acute, grave])
    assert STOPPED not in walk(table, [0, 2, 1])
    assert walk(table, [0, 2, 0, 1])[-1] == STOPPED


def test_text_without_a_part_of_a_stop_string_is_at_the_start():
    table = stop_table(["ab"], [b"a", b"c", b""])
    np.testing.assert_array_equal(walk(table, [2, 1, 0, 1]) == START, [True, True, False, True])


def test_a_compiled_program_reads_the_table():
    vocabulary = [b"a", b"b", b"c", b"ca"]
    table = stop_table(["aab"], vocabulary)
    tokens = [0, 1, 3, 0, 1, 2, 0]

    @jax.jit
    def compiled(table, tokens):
        def step(state, token):
            state = table[state, token]
            return state, state

        return jax.lax.scan(step, jnp.int32(START), tokens)[1]

    states = compiled(jnp.asarray(table), jnp.array(tokens))
    np.testing.assert_array_equal(states, walk(table, tokens))
    np.testing.assert_array_equal(states == STOPPED, [False] * 4 + [True] * 3)


def test_long_stop_strings_share_their_states():
    stops = ["x" * 300 + end for end in "abc"]
    table = stop_table(stops, [b"x", b"a", b"x" * 299])
    assert table.shape == (302, 3)
    assert table.dtype == np.int32
    assert walk(table, [0, 2, 0, 0, 1])[-1] == STOPPED
    assert STOPPED not in walk(table, [2, 1, 2, 1])


@pytest.mark.parametrize("stops", [[], (), [""], ["a", ""], "stop", ""])
def test_stop_strings_are_a_list_of_texts(stops):
    with pytest.raises(ValueError, match=r"a list of non-empty texts. Got: "):
        stop_table(stops, [b"a"])


@hypothesis.given(
    st.text(LETTERS, max_size=12), st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=4)
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_text_is_cut_where_the_first_stop_string_begins(text, stops):
    begins = (n for n in range(len(text)) if any(text.startswith(stop, n) for stop in stops))
    assert cut(text, stops) == text[: next(begins, len(text))]


@pytest.mark.slow
def test_smollm2_stops_where_its_text_does(smollm2):
    tokenizer, stops = smollm2.tokenizer, ["\n\nQuestion:", "}\n", "🤗"]
    table = stop_table(stops, token_bytes(tokenizer, smollm2.network.config.vocab_size))
    texts = ["It is 4.\n\n\n\nQuestion: 3+3?", "{\n  {}}\n\n", "a 🤔 b 🤗 c", "\n\nQuest}"]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        read = [tokenizer.decode(tokens[: n + 1]) for n in range(len(tokens))]
        stopped = [any(stop in part for stop in stops) for part in read]
        np.testing.assert_array_equal(walk(table, tokens) == STOPPED, stopped)
        assert stopped[-1] == (text != texts[-1])
