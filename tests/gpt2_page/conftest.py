"""The page as people start it, in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt2_convert import write_weights
from gpt2_core.config import ModelConfig
from parity.gpt2.cases import random_weights

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=300)


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    write_weights(random_weights(MODEL), path, "safetensors")
    return path


@pytest.fixture(scope="session")
def free_port():
    def free() -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return server.getsockname()[1]

    return free


@pytest.fixture(scope="session")
def serving(free_port):
    """Run a program that serves the page, with --port added; gives its address while it does."""

    @contextmanager
    def serving(program: Path, *arguments: str | Path, **environment: str) -> Iterator[str]:
        command = [sys.executable, program, *arguments, "--port", str(port := free_port())]
        variables = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"} | environment
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True)
        try:
            line = process.stdout.readline()
            assert line.startswith("the page is at http://"), process.communicate(timeout=60)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, out + err

    return serving
