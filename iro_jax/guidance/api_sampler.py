"""Chunks of text from a policy that is only reached over an API, as chunks of bytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from iro_jax.guidance.endpoint import END, NUM_SEEDS, Endpoint, Reply, Request
from iro_jax.models import Sampling, draw_keys
from iro_jax.search import Chunk, Frontier

BYTE_TOKENS = (*(bytes([byte]) for byte in range(256)), b"")
"""What each id stands for: the policy's tokens of a `Bridge`."""


class ApiSampler:
    """The `expand_fn` of a `HostSearch` whose policy is an endpoint.

    A chunk ends after L tokens of the server, where the model ends, with a stop string, or
    before the character that its room has no byte for: then the next chunk goes on from
    there. Stop strings are looked for here, since one may begin in an earlier chunk, and as in
    `Guide` an answer that one ends has no `END`.

    Rows with the same text share a request, so that all their successors are draws of their
    own. A request is never sent twice: a search that starts again meets its earlier replies.
    The server tokenises `prompt + answer so far` for every chunk; where that splits a word
    unlike the model did, the chunk is sampled as for a prompt that ends there.

    Args:
      endpoint: the policy.
      sampling: how its tokens are drawn; without a `top_k` the server's default stays.
      chunk_length: L, in tokens of the server.
      max_new_tokens: longest answer, in tokens of the server.
      bytes_per_token: room in a chunk for each of its tokens, at least 4.
      stop_strings: texts that end an answer.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        sampling: Sampling = Sampling(),
        chunk_length: int = 16,
        max_new_tokens: int = 256,
        bytes_per_token: int = 16,
        stop_strings: Sequence[str] = (),
    ):
        for name, size, least in (
            ("chunk_length", chunk_length, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("bytes_per_token", bytes_per_token, 4),
        ):
            if size < least:
                raise ValueError(f"{name} must be at least {least}. Got: {size}")
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ValueError(
                f"Stop strings must be a list of non-empty texts. Got: {stop_strings!r}"
            )
        self.endpoint = endpoint
        self.sampling = sampling
        self.chunk_length = chunk_length
        self.max_new_tokens = max_new_tokens
        self.chunk_bytes = chunk_length * bytes_per_token + 1
        self.stop_bytes = tuple(text.encode() for text in stop_strings)
        self.start([])

    @property
    def max_steps(self) -> int:
        """S: chunks of the longest answer."""
        return -(-self.max_new_tokens // self.chunk_length)

    def start(self, prompts: Sequence[str | None]) -> None:
        """Takes the texts of the next batch; None for a row that only fills it up."""
        self._prompts = list(prompts)
        self._requests: list[set[Request]] = [set() for _ in prompts]
        self._replies: dict[Request, Reply] = {}

    def num_tokens(self) -> list[int]:
        """How many tokens the server has sampled for each prompt of the batch."""
        return [sum(self._replies[r].num_tokens for r in of_prompt) for of_prompt in self._requests]

    def __call__(
        self, params: object, keys: Key[Array, " P"], frontier: Frontier
    ) -> tuple[Chunk, object]:
        """The `expand_fn`; `frontier` has at least `chunk_bytes` of room.

        Raises:
          ApiError: see there.
        """
        shape = (*frontier.open.shape, self.chunk_bytes)
        tokens, log_probs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        # What nobody asks for, such as the rows that fill a batch up, ends at once.
        tokens[..., 0] = END
        lengths, ended = np.ones(shape[:-1], np.int32), np.ones(shape[:-1], bool)
        waiting = self._waiting(frontier)
        requests = self._ask(keys, frontier, waiting)
        for (p, answer), slots in waiting.items():
            reply = self._replies[requests[p, answer]]
            for slot, continuation in zip(slots, reply.continuations, strict=True):
                ids, ended[slot] = self._fit(answer, continuation.ids)
                lengths[slot] = len(ids)
                tokens[slot][: len(ids)] = ids
                if continuation.log_probs is not None:
                    log_probs[slot][: len(ids)] = continuation.log_probs[: len(ids)]
        chunk = Chunk(*map(jnp.asarray, (tokens, lengths, ended, log_probs)))
        return chunk, frontier.memory

    def _waiting(self, frontier: Frontier) -> dict[tuple[int, bytes], list[tuple[int, int, int]]]:
        """Open slots by prompt and answer so far."""
        tokens, lengths = np.asarray(frontier.beams.tokens), np.asarray(frontier.beams.lengths)
        waiting: dict[tuple[int, bytes], list[tuple[int, int, int]]] = {}
        for p, k, b in np.argwhere(np.asarray(frontier.open)).tolist():
            if self._prompts[p] is not None:
                answer = bytes(tokens[p, k, : lengths[p, k]].tolist())
                waiting.setdefault((p, answer), []).append((p, k, b))
        return waiting

    def _ask(
        self,
        keys: Key[Array, " P"],
        frontier: Frontier,
        waiting: Mapping[tuple[int, bytes], Sequence[tuple[int, int, int]]],
    ) -> dict[tuple[int, bytes], Request]:
        """Sends what has not been sent before; returns where the replies are kept."""
        step, width = int(jnp.max(frontier.step)), frontier.open.shape[1]
        limit = min(self.chunk_length, self.max_new_tokens - step * self.chunk_length)
        seeds = np.asarray(_seeds(keys, frontier.step, width))
        requests = {
            (p, answer): Request(
                text=f"{self._prompts[p]}{answer.decode()}",
                count=len(slots),
                max_tokens=limit,
                seed=int(seeds[p, slots[0][1]]),
                sampling=self.sampling,
            )
            for (p, answer), slots in waiting.items()
        }
        for (p, _), request in requests.items():
            self._requests[p].add(request)
        new = [r for r in dict.fromkeys(requests.values()) if r not in self._replies]
        self._replies.update(zip(new, self.endpoint.sample(new), strict=True))
        return requests

    def _fit(self, answer: bytes, ids: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """The part of a continuation that becomes a chunk, and whether it ends the answer."""
        text = answer + bytes(ids[: -1 if ids[-1] == END else None])
        ends = [
            place + len(stop) - len(answer)
            for stop in self.stop_bytes
            if (place := text.find(stop)) >= 0
        ]
        end = min(ends, default=len(ids))
        if end <= self.chunk_bytes:
            return ids[:end], bool(ends) or ids[-1] == END
        end = self.chunk_bytes
        while 0x80 <= ids[end] < 0xC0:  # Inside of a character.
            end -= 1
        return ids[:end], False


@functools.partial(jax.jit, static_argnums=2)
def _seeds(keys: Key[Array, " P"], step: Int[Array, ""], rows: int) -> Int[Array, "P K"]:
    """Seeds below `NUM_SEEDS`, by prompt, step and row."""
    bits = jax.vmap(jax.vmap(jax.random.bits))(draw_keys(keys, step, rows))
    return (bits % jnp.uint32(NUM_SEEDS)).astype(jnp.int32)
