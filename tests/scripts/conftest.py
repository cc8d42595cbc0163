"""The commands as users run them: a small recipe, and a way to run a script in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def recipe(tmp_path, text_file) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 257}\n"
        f"data: {{corpus: text, path: {text_file}, tokenizer: bytes}}\n"
        "optimizer: {learning_rate: 3.0e-4, warmup_steps: 3}\n"
        "steps: 20\nbatch_size: 8\nlog_interval: 1\neval_sequences: 16\ncheckpoint_interval: 5\n"
    )
    return path


@pytest.fixture
def environment() -> dict[str, str]:
    """Without the number of CPU devices that these tests set for their own process."""
    return {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}


@pytest.fixture
def start(tmp_path, environment):
    def start(script: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


@pytest.fixture
def run(start):
    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        process = start(script, *arguments)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run
