"""Chunks of bytes from what a server replies."""

import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax import search as s
from iro_jax.guidance.api_sampler import ApiSampler
from iro_jax.guidance.endpoint import END
from iro_jax.models import prompt_keys
from tests.guidance.completions_server import (
    CompletionsServer,
    bytes_text,
    completion,
    endpoint,
    text_choice,
)

pytestmark = pytest.mark.needs("openai")


def chunk_of(replies, *, answer=b"", **settings):
    """What a sampler makes of a server's replies behind an answer: text, `END`, ended."""
    count = len(replies)
    body = completion([text_choice(*reply) for reply in replies])
    with CompletionsServer(lambda _: body) as server:
        sampler = ApiSampler(endpoint(server, log_probs=False), **settings)
        sampler.start(["x"])
        beams = s.Beams(
            tokens=np.array([*answer, *[0] * sampler.chunk_bytes]).reshape(1, 1, -1),
            lengths=np.full((1, 1), len(answer)),
            ended=np.zeros((1, 1), bool),
            finished=np.zeros((1, 1), bool),
            log_probs=np.zeros((1, 1)),
            scores=None,
            nodes=None,
        )
        frontier = s.Frontier(
            step=jnp.int32(0),
            beams=beams,
            open=np.ones((1, 1, count), bool),
            room=np.full((1, 1), sampler.chunk_bytes),
            memory=None,
        )
        chunk, _ = sampler(None, prompt_keys(0, ["0"]), frontier)
        [asked] = server.requests
    assert asked["prompt"] == "x" + answer.decode()
    found = []
    for b in range(count):
        ids = chunk.tokens[0, 0, b, : chunk.lengths[0, 0, b]].tolist()
        found.append((bytes_text(ids), END in ids, bool(chunk.ended[0, 0, b])))
    return found


def test_a_chunk_keeps_the_whole_characters_that_it_has_room_for():
    """Nine bytes for two tokens, the last of them for the end."""
    replies = [
        ("12345678", "stop"),
        ("123456789", "length"),
        ("1234567890", "length"),
        ("123456789", "stop"),
        ("1234567é!", "length"),
        ("12345678é", "length"),
        ("123456😀!", "stop"),
    ]
    assert chunk_of(replies, chunk_length=2, bytes_per_token=4) == [
        ("12345678", True, True),
        ("123456789", False, False),
        ("123456789", False, False),
        ("123456789", False, False),
        ("1234567é", False, False),
        ("12345678", False, False),
        ("123456", False, False),
    ]


def test_stop_strings_end_a_chunk_where_they_end():
    replies = [
        ("a--b", "length"),
        ("-b", "length"),
        ("b-", "length"),
        ("-a-", "stop"),
        ("<>", "stop"),
    ]
    found = chunk_of(replies, answer=b"x-", stop_strings=["--", "<>"])
    assert found == [
        ("a--", False, True),
        ("-", False, True),
        ("b-", False, False),
        ("-", False, True),
        ("<>", False, True),
    ]
