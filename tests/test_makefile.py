"""The targets that train: what they run, as `make` says without running it."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        (["train"], "scripts/train_jax.py"),
        (["train", "MESH=8", "CONFIG=gpt2"], "scripts/train_jax.py --config gpt2 --mesh 8"),
        (["train", "ARGS=--steps 3 --seed 2"], "scripts/train_jax.py --steps 3 --seed 2"),
        (
            ["ddp-train", "NGPUS=8", "CONFIG=configs/gpt2.yaml"],
            "--nproc_per_node 8 scripts/train_torch.py --config configs/gpt2.yaml",
        ),
        (["ddp-train"], "--nproc_per_node auto scripts/train_torch.py"),
    ],
)
def test_a_target_trains_with_the_options_that_are_given(typed, command):
    command_line = ["make", "--dry-run", "--no-print-directory", *typed]
    said = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert " ".join(said.splitlines()[-1].split()).endswith(command)
