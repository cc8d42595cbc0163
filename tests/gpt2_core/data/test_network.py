import errno
import socket

import pytest

from gpt2_core.data import network


def test_a_host_that_answers_is_a_network_and_one_that_refuses_is_none(server, url_of, no_proxy_set, monkeypatch):
    assert network.network_error(url_of(server)) is None
    monkeypatch.setenv("ALL_PROXY", url_of(server).replace("http", "socks5"))
    assert network.network_error("https://nowhere.invalid") is None  # the proxy resolves the name
    monkeypatch.setenv("NO_PROXY", "nowhere.invalid")
    assert isinstance(network.network_error("https://nowhere.invalid"), OSError)
    monkeypatch.setenv("HTTPS_PROXY", url_of(server).removeprefix("http://"))
    assert network.network_error("https://somewhere.invalid") is None
    server.close()
    assert isinstance(network.network_error("https://somewhere.invalid"), ConnectionRefusedError)


UNREACHABLE = OSError(errno.ENETUNREACH, "Network is unreachable")
NO_NAME = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.mark.parametrize(
    ("error", "seconds", "known"),
    [
        (ExceptionGroup("each address", [UNREACHABLE, UNREACHABLE]), 0.0, True),
        (ExceptionGroup("each address", [UNREACHABLE, TimeoutError()]), 4.0, False),  # IPv6 isn't there, IPv4 is slow
        (NO_NAME, 0.1, True),
        (NO_NAME, 10.0, False),  # the resolver itself has waited
    ],
)
def test_a_slow_network_is_a_network(error, seconds, known, no_proxy_set, monkeypatch):
    clock = [0.0]

    def connect(*_, **__):
        clock[0] += seconds
        raise error

    monkeypatch.setattr(network.socket, "create_connection", connect)
    monkeypatch.setattr(network.time, "monotonic", lambda: clock[0])
    assert (network.network_error("https://huggingface.co") is not None) == known
