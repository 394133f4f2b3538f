"""A reward server on this machine."""

from tests.local_server import LocalServer


class RewardServer(LocalServer):
    """`respond(body, number)` makes a reply from a request's body and its number."""

    def __init__(self, respond):
        super().__init__()
        self.respond = respond

    def reply(self, path, body, number):
        return self.respond(body, number)

    @property
    def url(self):
        return f"{super().url}/score"
