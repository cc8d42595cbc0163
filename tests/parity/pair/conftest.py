"""The tests' own models are importable by name; a right port that is compared once for several tests."""

import sys
from pathlib import Path

import optax
import pytest
import torch

import parity

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def right():
    import tiny

    return parity.compare(
        tiny.make_torch(),
        tiny.make_jax(),
        inputs=tiny.TOKENS,
        checks=("weights", "forward", "gradients", "optimizer", "loss_curve"),
        optimizer=(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
        steps=5,
        mutants=60,
    )
