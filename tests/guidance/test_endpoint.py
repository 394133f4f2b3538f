"""What servers may do to an endpoint's requests."""

import sys
import time

import numpy as np
import pytest

from iro_jax.guidance.endpoint import END, ApiError, Endpoint, Request
from tests.guidance.completions_server import (
    CompletionsServer,
    TextModel,
    choice,
    completion,
    endpoint,
    ids_of,
    serve,
    text_choice,
)

pytestmark = pytest.mark.needs("openai")


def request(text="x", count=2, max_tokens=4):
    return Request(text, count, max_tokens, seed=7)


def replies_of(respond, *requests, **settings):
    with CompletionsServer(respond) as server:
        through = endpoint(server, **settings)
        return through.sample(requests), server, through


def ids(reply):
    return [continuation.ids for continuation in reply.continuations]


def test_log_probs_lie_where_the_tokens_begin():
    sampled = [(" é", 0.5), ("😀", 0.25), (None, 0.125)]
    [reply], _, _ = replies_of(lambda body: completion([choice(sampled)]), request(count=1))
    [found] = reply.continuations
    assert found.ids == (*" é😀".encode(), END)
    spread = np.zeros(8)
    spread[[0, 3, 7]] = np.log([0.5, 0.25, 0.125])
    np.testing.assert_allclose(found.log_probs, spread)


def test_log_probs_of_unreadable_tokens_lie_on_the_first_byte():
    """OpenAI spells halves of characters `bytes:...`."""
    log_probs = {"tokens": ["bytes:\\xc3", "bytes:\\xa9"], "token_logprobs": [-1.0, -0.5]}
    body = completion([text_choice("é", "length", log_probs)])
    [reply], _, _ = replies_of(lambda _: body, request(count=1))
    assert reply.continuations[0].log_probs == (-1.5, 0.0)
    assert reply.num_tokens == 2


def test_log_probs_in_the_form_of_chats_are_read():
    content = [{"token": "a", "logprob": -1.0, "bytes": [97]}, {"token": "b", "logprob": -2.0}]
    body = completion([text_choice("ab", "length", {"content": content})])
    [reply], _, _ = replies_of(lambda _: body, request(count=1))
    assert reply.continuations[0].log_probs == (-1.0, -2.0)


def test_a_character_that_the_limit_cuts_is_left_to_the_next_chunk():
    [reply], _, _ = replies_of(
        lambda _: completion([text_choice("ab\ufffd"), text_choice("\ufffd", "stop")]),
        request(),
        log_probs=False,
    )
    assert ids(reply) == [tuple(b"ab"), (*"\ufffd".encode(), END)]


def test_less_than_a_character_is_asked_for_again_with_room_for_one():
    def respond(body):
        long_enough = body["max_tokens"] >= 4
        return completion([text_choice("😀" if long_enough else "")] * body["n"])

    [reply], server, _ = replies_of(respond, request(max_tokens=1), log_probs=False)
    assert ids(reply) == [tuple("😀".encode())] * 2
    assert [body["max_tokens"] for body in server.requests] == [1, 4]
    assert reply.num_requests == 2


def test_a_server_that_returns_fewer_choices_is_asked_for_the_rest():
    model = TextModel()
    [reply], server, _ = replies_of(serve(model, most_choices=2), request(count=5))
    assert [body["n"] for body in server.requests] == [5, 3, 1]
    seeds = [body["seed"] for body in server.requests]
    assert all(abs(a - b) > 1000 for a in seeds for b in seeds if a != b)
    assert len(set(seeds)) == 3
    drawn = [(seeds[0], 0), (seeds[0], 1), (seeds[1], 0), (seeds[1], 1), (seeds[2], 0)]
    expected = [model.sample("x", 4, seed, index) for seed, index in drawn]
    assert ids(reply) == [tuple(ids_of(token for token, _ in sampled)) for sampled in expected]
    assert reply.num_tokens == sum(map(len, expected))


def test_no_request_asks_for_more_choices_than_is_allowed():
    [reply], server, _ = replies_of(serve(TextModel()), request(count=5), max_choices=2)
    assert [body["n"] for body in server.requests] == [2, 2, 1]
    assert len(reply.continuations) == 5


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([], "0 choices in the last one, finish_reason none"),
        ([text_choice("bad", "content_filter")], "1 choices.*finish_reason content_filter"),
        ([text_choice("", "length")], "finish_reason length"),
    ],
)
def test_a_server_that_never_gives_text_is_an_error(choices, said):
    with pytest.raises(ApiError, match=f"3 requests for 2 continuations.*brought no text.*{said}"):
        replies_of(lambda _: completion(choices), request())


def failing(times, status=500):
    model, failures = serve(TextModel()), iter(range(times))

    def respond(body):
        if next(failures, None) is not None:
            return status, {"error": {"message": "overloaded"}}
        return model(body)

    return respond


def test_failures_of_the_server_are_retried():
    [found], server, _ = replies_of(failing(2), request())
    assert server.requests == [server.requests[0]] * 3
    assert replies_of(failing(0), request())[0] == [found]


@pytest.mark.parametrize("status", [500, 429])
def test_a_server_that_always_fails_is_an_error(status):
    with pytest.raises(ApiError, match=rf"tiny.*{status}.*overloaded"):
        replies_of(failing(9, status), request(), max_retries=1)


def test_what_is_wrong_with_the_connection_is_said(server):
    wrong_name = Endpoint("huge", base_url=server.url, api_key="none")
    with pytest.raises(ApiError, match=r"huge.*404.*The model `huge` does not exist"):
        wrong_name.sample([request()])
    wrong_path = Endpoint("tiny", base_url=server.url.removesuffix("/v1"), api_key="none")
    with pytest.raises(ApiError, match=r"base_url usually ends in /v1. Got: no such page"):
        wrong_path.sample([request()])
    with CompletionsServer(lambda _: completion([])) as stopped:
        gone = endpoint(stopped, max_retries=0)
    with pytest.raises(ApiError, match=r"127.0.0.1.*no connection: .*refused"):
        gone.sample([request()])

    def late(body):
        time.sleep(0.3)
        return completion([])

    with pytest.raises(ApiError, match=r"no connection: .*timed out"):
        replies_of(late, request(), timeout=0.05, max_retries=0)


def test_an_answer_that_is_no_completion_is_an_error():
    with pytest.raises(ApiError, match="no completion"):
        replies_of(lambda _: {"object": "error"}, request())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'iro_jax\[api\]'"):
        Endpoint("tiny", base_url="http://127.0.0.1:1/v1", api_key="none")


def test_a_client_of_ones_own_is_used(server):
    import openai

    client = openai.OpenAI(base_url=server.url, api_key="none")
    [reply] = Endpoint("tiny", client=client).sample([request()])
    assert len(reply.continuations) == 2
    with pytest.raises(ValueError, match="has its own base_url"):
        Endpoint("tiny", client=client, api_key="other")
