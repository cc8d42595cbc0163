import importlib.util
import socket

import pytest

from gpt2_commands import page
from gpt2_core.errors import UserError


def test_without_gradio_a_sentence_names_the_extra(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find_spec(name))
    with pytest.raises(UserError, match=r"^gpt2 page: needs the package gradio; pip install 'gpt2-jax\[page\]'$"):
        page.main(["--weights", "nowhere"])


def test_what_cannot_be_served_is_said_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^--host 127.0.0.1 --port {port}: nothing can be served there \([\w ]+ in use\);"
        ):
            page.main(["--weights", "nowhere", "--port", str(port)])
    page.check_address("127.0.0.1", port)
    for arguments, said in (
        (["--port", "0"], "^--port 0: must be from 1 to 65535"),
        (["--port", "65536"], "^--port 65536: must be from 1 to 65535"),
        (["--host", "192.0.2.1"], "^--host 192.0.2.1 --port 7860: nothing can be served there"),
        (["--host", "no such host"], "^--host no such host --port 7860: nothing can be served there"),
        (["--force"], "^--force: replaces the files of a Space; add --space FOLDER"),
    ):
        with pytest.raises(UserError, match=said):
            page.main(["--weights", "nowhere", *arguments])
