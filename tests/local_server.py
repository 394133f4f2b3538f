"""A server on this machine that answers POST requests, for tests of what asks one."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer:
    """A context manager; `reply` says what is answered.

    Attributes:
      requests: the bodies in the order of their arrival.
      headers: of the last request.
      most_at_once: how many requests were answered at the same time.
    """

    def __init__(self):
        self.requests, self.headers = [], {}
        self.most_at_once, self._now = 0, 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def reply(self, path, body, number):
        """From a request's path, body and number to a reply's body, or `(status, body)`.

        Bytes are sent as they are, text as HTML, anything else as JSON; None breaks the connection
        off.
        """
        raise NotImplementedError

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
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
                    server.headers = dict(self.headers)
                    number = len(server.requests)
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                reply = server.reply(self.path, body, number)
                with server._lock:
                    server._now -= 1
                if reply is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, found = reply if isinstance(reply, tuple) else (200, reply)
                self.send_response(status)
                if isinstance(found, bytes):
                    data = found
                else:
                    html = isinstance(found, str)
                    self.send_header("Content-Type", "text/html" if html else "application/json")
                    data = (found if html else json.dumps(found)).encode()
                self.send_header("Content-Length", str(len(data)))
                # OpenAI's client waits that long before it tries again.
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                # Nobody is there any more where a test waits for less than a reply takes.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        return Handler
