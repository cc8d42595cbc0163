"""Names of the Hub, against a small server on this machine that answers as the Hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpt2_convert import hub, open_weights, write_weights
from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from parity.gpt2.cases import random_weights

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=20)
COMMIT = "0" * 39 + "1"


@pytest.fixture
def server(tmp_path, request):
    """The repository me/tiny, with weights in the test's format; gives the address and the list of files sent."""
    folder = tmp_path / "served"
    write_weights(random_weights(CONFIG), folder, request.param)
    (folder / "tf_model.h5").write_bytes(b"another framework's")
    sent: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = self.path.split("?")[0]
            files = {f.name: f.read_bytes() for f in folder.iterdir()}
            name = path.rpartition("/")[2]
            if path.startswith("/api/models/me/tiny/tree/"):
                entries = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in files.items()]
                self.send(200, json.dumps(entries).encode())
            elif path.startswith("/api/models/me/tiny"):
                siblings = [{"rfilename": n} for n in files]
                self.send(200, json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith("/me/tiny/resolve/") and name in files:
                if self.command == "GET":
                    sent.append(name)
                self.send(200, files[name], {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": COMMIT})
            else:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def send(self, code: int, content: bytes, headers=()) -> None:
            self.send_response(code)
            for key, value in dict(headers).items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = answer

        def log_message(self, *args) -> None:
            pass

    def etag(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", sent, running
    running.shutdown()


def convert(tmp_path, address: str, name: str, target: str, *options: str) -> tuple[int, str]:
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, str(ROOT / "scripts/convert.py"), name, target, "--to", "safetensors", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("server", ["msgpack"], indirect=True)
def test_a_repository_that_has_weights_for_flax_alone_is_read(tmp_path, server):
    address, sent, _ = server
    code, err = convert(tmp_path, address, "me/tiny", "a.safetensors")
    assert code == 0, err
    assert {"config.json", "flax_model.msgpack"} <= set(sent) and "tf_model.h5" not in sent


@pytest.mark.long
@pytest.mark.parametrize("server", ["hf"], indirect=True)
def test_a_model_is_fetched_by_its_name_and_kept(tmp_path, server):
    address, sent, running = server
    code, err = convert(tmp_path, address, "me/tiny", "a.safetensors")
    assert code == 0, err
    assert {"config.json", "model.safetensors"} <= set(sent) and "tf_model.h5" not in sent
    expected = random_weights(CONFIG).arrays
    found = open_weights(tmp_path / "a.safetensors").arrays
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())

    code, err = convert(tmp_path, address, "me/none", "b.safetensors")
    assert code == 2 and "me/none: no such file or folder here, and no model of that name on the Hub" in err
    # Without a network, the cache serves; what it doesn't have is told how to come by.
    running.shutdown()
    running.server_close()
    assert convert(tmp_path, address, "me/tiny", "c.safetensors")[0] == 0
    code, err = convert(tmp_path, address, "gpt2-xl", "d.safetensors")
    assert code == 2 and err.startswith("error: gpt2-xl: not a file or folder here, nor in the Hub's cache")
    assert "hf download openai-community/gpt2-xl --local-dir gpt2-xl" in err and err.count("\n") == 1


def test_what_is_on_this_machine_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("gpt2") and hub.is_name("openai-community/gpt2")
    (tmp_path / "runs").mkdir()
    assert not hub.is_name("runs/mine")  # a run that isn't there, and not a model of somebody called runs
    for path in ("model.safetensors", "a/b/c", "/gpt2", "../gpt2", "gpt2/"):
        assert not hub.is_name(path)
    with pytest.raises(UserError, match="runs/mine: no such file or folder"):
        open_weights("runs/mine")
    write_weights(random_weights(CONFIG), tmp_path / "gpt2", "hf")
    assert not hub.is_name("gpt2") and open_weights("gpt2").config == CONFIG
