"""A completions server on this machine, and a model of text small enough to write down."""

import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


class CompletionsServer:
    """Answers `POST /v1/completions`; a context manager.

    `respond` makes a body from a request's body, or `(status, body)`; text is sent as it is.

    Attributes:
      requests: the bodies in the order of their arrival.
      most_at_once: how many requests were answered at the same time.
    """

    def __init__(self, respond):
        self.respond = respond
        self.requests, self.most_at_once, self._now = [], 0, 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.requests.append(body)
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                found = server.respond(body) if self.path == "/v1/completions" else "no such page"
                with server._lock:
                    server._now -= 1
                status, found = found if isinstance(found, tuple) else (200, found)
                kind = "text/html" if isinstance(found, str) else "application/json"
                data = (found if isinstance(found, str) else json.dumps(found)).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        return Handler


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
