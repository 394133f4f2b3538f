"""What tests of policies behind an endpoint share."""

import pytest

from tests.guidance.completions_server import CompletionsServer, TextModel, serve


@pytest.fixture
def server():
    """One that answers as it should."""
    with CompletionsServer(serve(TextModel())) as running:
        yield running
