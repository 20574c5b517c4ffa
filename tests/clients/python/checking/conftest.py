"""What the tests of checking share."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.clients.python.feeding.site import Request, Site, running_site


def echo(request: Request) -> None:
    """Tell a request where it came from, and its headers."""
    body = {"origin": request.client_address[0], "headers": dict(request.headers)}
    request.answer(200, json.dumps(body).encode())


@pytest.fixture
def site() -> Iterator[Site]:
    """A site that shows who asks at `/`."""
    # Not at the address that requests come from, which would then stand in their Host.
    with running_site(host="127.0.0.3") as site:
        site.answers["/"] = echo
        yield site
