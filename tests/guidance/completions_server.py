"""A completions server on this machine, and a model of text small enough to write down."""

import math
import random

from iro_jax.guidance.endpoint import END as BYTES_END
from iro_jax.guidance.endpoint import Endpoint
from tests.local_server import LocalServer

END = None
TOKENS = ("a", "b", " the", " film", "é", "😀", " 你好", ".", "\n", END)
"""No token begins another, so that a text has one spelling."""


class TextModel:
    """The next token depends on the last character; log-probabilities are exact."""

    def __init__(self, seed=0, end_weight=0.5):
        self.seed, self.end_weight = seed, end_weight

    def probabilities(self, text):
        rng = random.Random(f"{self.seed}/{text[-1:]}")
        weights = [rng.random() for _ in TOKENS[:-1]]
        weights.append(self.end_weight * sum(weights) / len(weights))
        return [weight / sum(weights) for weight in weights]

    def sample(self, text, max_tokens, seed, index):
        """Tokens with their probabilities; `END` is the last if the model ended there."""
        rng = random.Random(f"{seed}/{index}")
        sampled = []
        while len(sampled) < max_tokens and (not sampled or sampled[-1][0] is not END):
            probabilities = self.probabilities(text)
            [which] = rng.choices(range(len(TOKENS)), probabilities)
            sampled.append((TOKENS[which], probabilities[which]))
            text += TOKENS[which] or ""
        return sampled


class CompletionsServer(LocalServer):
    """Answers `POST /v1/completions`: `respond` makes a reply from a request's body."""

    def __init__(self, respond):
        super().__init__()
        self.respond = respond

    def reply(self, path, body, number):
        return self.respond(body) if path == "/v1/completions" else "no such page"

    @property
    def url(self):
        return f"{super().url}/v1"


def serve(model, *, name="tiny", most_choices=None):
    """The `respond` of an honest server of a `TextModel`."""

    def respond(body):
        if body["model"] != name:
            message = f"The model `{body['model']}` does not exist"
            return 404, {"error": {"message": message, "type": "invalid_request_error"}}
        count = min(body["n"], most_choices or body["n"])
        choices = [
            choice(model.sample(body["prompt"], body["max_tokens"], body["seed"], index), index)
            for index in range(count)
        ]
        num_tokens = sum(len(one["logprobs"]["tokens"]) for one in choices)
        if "logprobs" not in body:
            for one in choices:
                one["logprobs"] = None
        usage = {"prompt_tokens": 1, "completion_tokens": num_tokens}
        return completion(choices, usage=usage | {"total_tokens": 1 + num_tokens})

    return respond


def choice(sampled, index=0):
    """A choice from tokens with their probabilities."""
    return {
        "index": index,
        "text": "".join(token or "" for token, _ in sampled),
        "finish_reason": "stop" if sampled[-1][0] is END else "length",
        "logprobs": {
            "tokens": [token or "</s>" for token, _ in sampled],
            "token_logprobs": [math.log(probability) for _, probability in sampled],
            "text_offset": [0 for _ in sampled],
            "top_logprobs": None,
        },
    }


def completion(choices, **fields):
    """The body around choices."""
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 0,
        "model": "tiny",
        "choices": choices,
    } | fields


def text_choice(text, finish_reason="length", logprobs=None):
    """A choice as servers write it."""
    return {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": logprobs}


def endpoint(server, **settings):
    """Of such a server."""
    return Endpoint("tiny", base_url=server.url, api_key="none", **settings)


def ids_of(tokens):
    """The bytes of the server's tokens, None being the end."""
    return [i for token in tokens for i in (token.encode() if token is not None else [BYTES_END])]


def bytes_text(ids):
    """The text of bytes, without the end."""
    return bytes(i for i in ids if i != BYTES_END).decode()
