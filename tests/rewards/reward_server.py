"""A reward server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RewardServer:
    """Answers POST requests; a context manager.

    `respond(body, number)` makes a reply's body, or `(status, body)`, from a request's body
    and its number; None breaks the connection off.

    Attributes:
      requests: the bodies in the order of their arrival.
      headers: of the last request.
    """

    def __init__(self, respond):
        self.respond = respond
        self.requests, self.headers = [], {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/score"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(body)
                    outer.headers = dict(self.headers)
                    number = len(outer.requests)
                reply = outer.respond(body, number)
                if reply is None:
                    self.connection.close()
                    return
                status, reply = reply if isinstance(reply, tuple) else (200, reply)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        return Handler
