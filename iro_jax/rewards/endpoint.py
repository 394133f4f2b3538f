"""A reward behind an HTTP endpoint.

    POST {"prompts": [...], "answers": [...]}  ->  {"rewards": [...]}

A prompt is text or a list of messages with `role` and `content`, an answer is text.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float

from iro_jax.data import Prompt
from iro_jax.rewards.types import Answer, check_pairs, check_rewards

_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class RewardEndpointError(RuntimeError):
    """A server that cannot be reached, refuses a request, or answers with no use."""


class EndpointReward:
    """The rewards that a server gives.

    Args:
      url: of the endpoint, http or https.
      headers: of every request, such as `{"Authorization": "Bearer ..."}`.
      batch_size: answers a request.
      timeout: seconds to wait for the server at any one time.
      max_retries: how often a request is repeated that failed by no fault of its own: no
        connection, a broken one, a time-out, or one of the statuses 408, 425, 429 and 5xx.
      backoff: seconds before the first repetition; each later one waits twice as long.
      max_connections: requests at the same time.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        batch_size: int = 32,
        timeout: float = 60.0,
        max_retries: int = 5,
        backoff: float = 0.5,
        max_connections: int = 4,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be that of an http or https endpoint. Got: {url!r}")
        if min(batch_size, max_connections) < 1 or timeout <= 0 or min(max_retries, backoff) < 0:
            raise ValueError(
                "batch_size and max_connections must be at least 1, timeout positive, max_retries"
                f" and backoff not negative. Got: {batch_size}, {max_connections}, {timeout},"
                f" {max_retries}, {backoff}"
            )
        self.url = url
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        self.batch_size = batch_size
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.max_connections = max_connections

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`.

        Raises:
          RewardEndpointError: a request failed for good; what other requests brought is lost
            unless a `CachedReward` asks for less at a time.
          ValueError: a reward is not finite; names the prompt's id.
        """
        check_pairs(prompts, answers)
        bodies = [
            _body(
                prompts[start : start + self.batch_size], answers[start : start + self.batch_size]
            )
            for start in range(0, len(answers), self.batch_size)
        ]
        with ThreadPoolExecutor(self.max_connections) as pool:
            rewards = [number for batch in pool.map(self._rewards, bodies) for number in batch]
        return check_rewards(rewards, prompts)

    def _rewards(self, body: Mapping[str, list[Any]]) -> list[float]:
        reply = self._post(json.dumps(body).encode())
        expected = len(body["answers"])
        try:
            rewards = json.loads(reply)["rewards"]
        except (ValueError, TypeError, KeyError):
            raise self._useless(expected, reply) from None
        if not isinstance(rewards, list) or len(rewards) != expected:
            raise self._useless(expected, reply)
        if any(isinstance(x, bool) or not isinstance(x, int | float) for x in rewards):
            raise self._useless(expected, reply)
        return rewards

    def _useless(self, expected: int, reply: bytes) -> RewardEndpointError:
        return RewardEndpointError(
            f'{self.url}: expected {{"rewards": [...]}} with {expected} numbers.'
            f" Got: {_shorten(reply)}"
        )

    def _post(self, data: bytes) -> bytes:
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            request = urllib.request.Request(self.url, data, self.headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {_shorten(_read_body(error))}"
                if error.code not in _TRY_AGAIN:
                    raise RewardEndpointError(
                        f"{self.url}: the server refused a request. Got: {failure}"
                    ) from None
            except (OSError, http.client.HTTPException) as error:
                failure = f"{type(error).__name__}: {error}"
        raise RewardEndpointError(
            f"{self.url}: no reply after {self.max_retries + 1} attempts. Got: {failure}"
        )


def _body(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, list[Any]]:
    conversations = [prompt.to_json()["prompt"] for prompt in prompts]
    return {"prompts": conversations, "answers": [answer.text for answer in answers]}


def _read_body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _shorten(reply: bytes) -> str:
    shown = repr(reply.decode(errors="replace"))
    return shown if len(shown) <= 200 else shown[:197] + "..."
