"""Rewards that a server gives."""

import socket
import threading

import numpy as np
import pytest

from iro_jax.data import Prompt
from iro_jax.rewards import EndpointReward, RewardEndpointError, TextAnswer
from tests.rewards.reward_server import RewardServer

PROMPTS = [Prompt(f"p{i}", "x" * i or "0") for i in range(10)]
ANSWERS = [TextAnswer("é" * i) for i in range(10)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def lengths(body, number):
    return {"rewards": [len(answer) for answer in body["answers"]]}


def test_batches_come_back_in_order():
    with RewardServer(lengths) as server:
        reward = EndpointReward(server.url, batch_size=3, headers={"Authorization": "Bearer key"})
        rewards = reward(PROMPTS, ANSWERS)
        np.testing.assert_array_equal(rewards, np.arange(10))
        assert rewards.dtype == np.float32
        assert sorted(len(body["prompts"]) for body in server.requests) == [1, 3, 3, 3]
        assert server.headers["Authorization"] == "Bearer key"
        assert server.headers["Content-Type"] == "application/json"
        assert reward([], []).shape == (0,)


def test_conversations_are_sent_as_messages():
    messages = [{"role": "user", "content": "hello"}]
    with RewardServer(lengths) as server:
        EndpointReward(server.url)([Prompt("p", messages), Prompt("q", "raw")], ANSWERS[1:3])
        assert server.requests == [{"prompts": [messages, "raw"], "answers": ["é", "éé"]}]


@pytest.mark.parametrize("failure", [(503, {"error": "busy"}), (429, b"slow down"), None])
def test_what_passes_is_tried_again(failure):
    def respond(body, number):
        return failure if number < 3 else lengths(body, number)

    with RewardServer(respond) as server:
        rewards = EndpointReward(server.url, backoff=0.001)(PROMPTS, ANSWERS)
        assert len(server.requests) == 3
    np.testing.assert_array_equal(rewards, np.arange(10))


def test_waits_grow(monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    with RewardServer(lambda *request: (500, b"broken")) as server:
        reward = EndpointReward(server.url, max_retries=3, backoff=2.0)
        with pytest.raises(RewardEndpointError, match=r"4 attempts\. Got: status 500: 'broken'"):
            reward(PROMPTS, ANSWERS)
        assert len(server.requests) == 4
    assert [wait for wait in waits if wait >= 2] == [2, 4, 8]


def test_a_refusal_is_final():
    with RewardServer(lambda *request: (422, {"detail": "no such field"})) as server:
        with pytest.raises(RewardEndpointError, match=r"refused .*status 422.*no such field"):
            EndpointReward(server.url)(PROMPTS, ANSWERS)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"<html>",
        [1.0],
        {"scores": [1.0]},
        {"rewards": [1.0, 2.0]},
        {"rewards": [1.0] * 9 + ["2"]},
        {"rewards": [1.0] * 9 + [None]},
        {"rewards": 1.0},
    ],
)
def test_a_reply_without_the_rewards(reply):
    with RewardServer(lambda *request: reply) as server:
        with pytest.raises(RewardEndpointError, match=r"expected .* with 10 numbers\. Got: "):
            EndpointReward(server.url)(PROMPTS, ANSWERS)
        assert len(server.requests) == 1


def test_nan_names_its_prompt():
    def respond(body, number):
        return {"rewards": [1.0] * 7 + [float("nan")] + [1.0] * 2}

    with (
        RewardServer(respond) as server,
        pytest.raises(ValueError, match="prompt 'p7' must be a finite number"),
    ):
        EndpointReward(server.url)(PROMPTS, ANSWERS)


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(RewardEndpointError, match=r"no reply after 2 attempts\. Got: URLError"):
        EndpointReward(url, max_retries=1, backoff=0.001)(PROMPTS, ANSWERS)


def test_a_server_that_is_silent():
    release = threading.Event()

    def respond(body, number):
        release.wait(30)
        return lengths(body, number)

    with RewardServer(respond) as server:
        reward = EndpointReward(server.url, timeout=0.05, max_retries=0)
        with pytest.raises(RewardEndpointError, match=r"1 attempts\. Got: TimeoutError"):
            reward(PROMPTS, ANSWERS)
        release.set()


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("file:///etc/hosts", {}, "http or https"),
        ("localhost:8000", {}, "http or https"),
        ("http://localhost", {"batch_size": 0}, "batch_size"),
        ("http://localhost", {"timeout": 0}, "timeout positive"),
        ("http://localhost", {"max_retries": -1}, "not negative"),
    ],
)
def test_arguments(url, options, message):
    with pytest.raises(ValueError, match=message):
        EndpointReward(url, **options)
