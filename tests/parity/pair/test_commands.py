"""python -m parity compare and capture, as a user types them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[2])])}
    command = [sys.executable, "-W", "ignore", "-m", "parity", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_models_in_two_environments_are_compared_through_a_file(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(14).reshape(2, 7))
    done = run(tmp_path, "capture", "tiny:make_torch", "--inputs", "tokens.npy", "--out", "torch.safetensors")
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, "capture", "tiny:make_torch", "--inputs", "tokens.npy", "--out", "torch.safetensors")
    assert done.returncode == 2 and "torch.safetensors: exists" in done.stderr and done.stderr.count("\n") == 1
    done = run(tmp_path, "compare", "torch.safetensors", "tiny:make_jax", "--checks", "weights,forward")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "parity_report" / "mapping.yaml").is_file()
    done = run(tmp_path, "compare", "torch.safetensors", "tiny:make_wrong", "--checks", "weights,forward")
    assert done.returncode == 1 and "GELU by tanh" in done.stdout and "tiny.py:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no command: expected parity compare"),
        (("judge",), "judge: expected parity compare"),
        (("compare", "tiny:make_torch", "tiny:make_jax"), "--inputs: is needed"),
        (("compare", "tiny", "tiny:make_jax", "--inputs", "tiny:TOKENS"), "model tiny: expected module:name"),
        (("compare", "tiny:no", "tiny:make_jax", "--inputs", "tiny:TOKENS"), "has no attribute 'no'"),
        (("compare", "no.safetensors", "tiny:make_jax"), "no.safetensors: can't be read as a captured model"),
        (("compare", "tiny:make_torch", "tiny:make_jax", "--inputs", "no.npy"), "--inputs no.npy: can't be read"),
        (
            ("compare", "tiny:make_torch", "tiny:make_jax", "--inpts", "x"),
            "--inpts: not expected here; did you mean --inputs?",
        ),
        (("compare", "tiny:make_torch", "tiny:make_jax", "--steps", "x"), "--steps: expected a whole number, not x"),
        (("capture", "tiny:make_torch"), "required: --inputs, --out; see --help"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(tmp_path, arguments, words):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
