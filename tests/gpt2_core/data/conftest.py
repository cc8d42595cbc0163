"""A host on this machine, for what asks whether there is a network."""

import os
import socket

import pytest


@pytest.fixture
def server():
    """A server on this machine, whose address is left to the test; nothing else is listening there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def no_proxy_set(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def url_of():
    return lambda server: "http://{}:{}".format(*server.getsockname())
