"""An OpenAI-compatible completions endpoint: continuations of texts, many at a time.

What servers do differently is dealt with here: how many choices they give, what they say of
log-probabilities and usage, and what they show of a character that the limit has cut in two.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from iro_jax.models import Sampling

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import CompletionChoice

END = 256
"""The id that ends an answer; smaller ones are bytes."""

NUM_SEEDS = 2**31
"""Seeds are below."""

_PLAIN = Sampling()
_ENDS = ("stop", "eos_token", "stop_sequence")
_PATIENCE = 3
# Servers count seeds up for the choices of one request; the next request must be far away.
_SEED_STRIDE = 0x61C88647


class ApiError(RuntimeError):
    """A server that cannot be reached, refuses a request, or answers with no use."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a server is asked for.

    Attributes:
      text: to continue.
      count: of continuations.
      max_tokens: of each of them.
      seed: for servers that honour one.
      sampling: how tokens are drawn.
    """

    text: str
    count: int
    max_tokens: int
    seed: int
    sampling: Sampling = _PLAIN


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A continuation as ids.

    Attributes:
      ids: its bytes, whole characters only, and `END` if the model ended there.
      log_probs: of each id: a token's is at its first byte where the server's tokens spell
        the text; otherwise all of them are at the first byte. None if the server gave none.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
      continuations: as many as were asked for.
      num_requests: how often the server was asked.
      prompt_tokens: tokens that the server read, 0 if it does not say.
      num_tokens: tokens that it sampled, those of no use included; for a server that does
        not say, as many as it was allowed.
    """

    continuations: tuple[Continuation, ...]
    num_requests: int
    prompt_tokens: int
    num_tokens: int


class Endpoint:
    """An OpenAI-compatible completions endpoint; needs the package `openai`.

    Args:
      model: its name at the server.
      base_url: such as `http://localhost:8000/v1`; by default OpenAI's own.
      api_key: by default that of the environment; one's own server takes any text.
      timeout: seconds a request may take.
      max_retries: how often a request is repeated that failed by no fault of its own.
      client: an `openai.OpenAI` that is set up already, in place of the four above.
      max_connections: requests at the same time.
      max_choices: most continuations that one request may ask for, where a server has a
        limit. One that silently returns fewer is asked again for the rest.
      log_probs: whether to ask for log-probabilities. A server that gives none is warned of
        once.
      extra_body: further fields of every request. Samplers that a server applies by default
        are switched off here, such as `{"top_k": -1}` for vLLM.

    Attributes:
      num_requests, prompt_tokens, num_tokens: of all replies so far; see `Reply`.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 5,
        client: OpenAI | None = None,
        max_connections: int = 32,
        max_choices: int | None = None,
        log_probs: bool = True,
        extra_body: Mapping[str, Any] | None = None,
    ):
        if max_connections < 1 or (max_choices is not None and max_choices < 1):
            raise ValueError(
                "max_connections and max_choices must be at least 1."
                f" Got: {max_connections}, {max_choices}"
            )
        if client is None:
            client = _openai().OpenAI(
                base_url=base_url, api_key=api_key, timeout=timeout, max_retries=max_retries
            )
        elif base_url is not None or api_key is not None:
            raise ValueError("A client has its own base_url and api_key. Got: both")
        self.model = model
        self.client = client
        self.max_connections = max_connections
        self.max_choices = max_choices
        self.log_probs = log_probs
        self.extra_body = dict(extra_body or {})
        self.num_requests = self.prompt_tokens = self.num_tokens = 0
        self._warned = False

    def __str__(self) -> str:
        return f"{self.client.base_url} (model {self.model!r})"

    def sample(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers requests, several at a time.

        Raises:
          ApiError: see there. Requests that were not sent yet are dropped.
        """
        if not requests:
            return []
        with ThreadPoolExecutor(min(self.max_connections, len(requests))) as pool:
            replies = list(pool.map(self._sample, requests))
        given = [c.log_probs for reply in replies for c in reply.continuations]
        if self.log_probs and None in given and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self}: the server gives no log-probabilities; they count as zero."
                " log_probs=False does not ask for them",
                stacklevel=2,
            )
        self.num_requests += sum(reply.num_requests for reply in replies)
        self.prompt_tokens += sum(reply.prompt_tokens for reply in replies)
        self.num_tokens += sum(reply.num_tokens for reply in replies)
        return replies

    def _sample(self, request: Request) -> Reply:
        found: list[Continuation] = []
        asked = fruitless = prompt_tokens = num_tokens = 0
        max_tokens = request.max_tokens
        while len(found) < request.count:
            count = min(request.count - len(found), self.max_choices or request.count)
            seed = (request.seed + asked * _SEED_STRIDE) % NUM_SEEDS
            response = self._ask(request, count, max_tokens, seed)
            asked += 1
            choices = response.choices
            given = [_continuation(choice) for choice in choices]
            found += [continuation for continuation in given if continuation is not None]
            prompt_tokens += (response.usage.prompt_tokens or 0) if response.usage else 0
            num_tokens += _num_tokens(response, max_tokens)
            fruitless = 0 if any(given) else fruitless + 1
            if fruitless == _PATIENCE:
                reasons = sorted({str(choice.finish_reason) for choice in choices})
                raise ApiError(
                    f"{self}: {_PATIENCE} requests for {count} continuations of {max_tokens}"
                    f" tokens brought no text. Got: {len(choices)} choices in the last one,"
                    f" finish_reason {', '.join(reasons) or 'none'}"
                )
            # What was less than a character is asked for again with room for a whole one.
            max_tokens = request.max_tokens + (3 if None in given else 0)
        return Reply(tuple(found[: request.count]), asked, prompt_tokens, num_tokens)

    def _ask(self, request: Request, count: int, max_tokens: int, seed: int) -> Any:
        openai = _openai()
        sampling = request.sampling
        top_k = {} if sampling.top_k is None else {"top_k": sampling.top_k}
        optional: dict[str, Any] = {"logprobs": 1} if self.log_probs else {}
        try:
            response = self.client.completions.create(
                model=self.model,
                prompt=request.text,
                n=count,
                max_tokens=max_tokens,
                seed=seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                extra_body=self.extra_body | top_k,
                **optional,
            )
        except openai.APIStatusError as error:
            raise ApiError(f"{self}: {error}") from error
        except openai.APIConnectionError as error:
            cause = str(error.__cause__ or "") or error
            raise ApiError(f"{self}: no connection: {cause}") from error
        except (openai.OpenAIError, ValueError) as error:
            raise ApiError(f"{self}: the answer cannot be read: {error}") from error
        if not isinstance(getattr(response, "choices", None), list):
            raise ApiError(
                f"{self}: the answer is no completion; base_url usually ends in /v1."
                f" Got: {str(response)[:200]}"
            )
        return response


def _continuation(choice: CompletionChoice) -> Continuation | None:
    """A choice as ids; None if it holds no text or ended for another reason than length or EOS."""
    text, ended = choice.text or "", choice.finish_reason in _ENDS
    if not ended:
        if choice.finish_reason != "length":
            return None
        # What a server shows of a character that the end of the chunk has cut.
        text = text.rstrip("\ufffd")
    ids = [*text.encode(errors="replace"), *([END] if ended else [])]
    if not ids:
        return None
    return Continuation(tuple(ids), _spread(text, choice, len(ids)))


def _spread(text: str, choice: CompletionChoice, length: int) -> tuple[float, ...] | None:
    """Log-probabilities of the ids of a text and perhaps its end; see `Continuation`."""
    if choice.logprobs is None:
        return None
    tokens = _token_log_probs(choice)
    spelled = "".join(token for token, _ in tokens).startswith(text)
    spread, place = [0.0] * length, 0
    for token, log_prob in tokens:
        if place < length:
            spread[place] += log_prob
        place += len(token.encode(errors="replace")) if spelled else 0
    return tuple(spread)


def _token_log_probs(choice: CompletionChoice) -> list[tuple[str, float]]:
    """Tokens with their log-probabilities, as far as the server gives them."""
    given = choice.logprobs
    # The form of chats, which llama.cpp uses for completions too.
    content = getattr(given, "content", None)
    if content:
        return [(entry["token"], float(entry["logprob"])) for entry in content]
    if given is None or not given.tokens or not given.token_logprobs:
        return []
    pairs = zip(given.tokens, given.token_logprobs, strict=False)
    return [(token, float(log_prob or 0.0)) for token, log_prob in pairs]


def _num_tokens(response: Any, max_tokens: int) -> int:
    """Tokens that were sampled; some servers report the usage of the first choice only."""
    counted = sum(len(_token_log_probs(choice)) for choice in response.choices)
    reported = response.usage.completion_tokens if response.usage else None
    if reported is not None:
        return max(reported, counted)
    return counted or max_tokens * len(response.choices)


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            "A policy behind an API needs the package openai: pip install 'iro_jax[api]'"
        ) from error
    return openai
