import jax
import pytest

from gpt2_core.config import ModelConfig
from parity.subjects import random_weights, real_text
from parity.suite import Subject


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def subject() -> Subject:
    """The smallest thing on which everything can go wrong: two layers, two heads."""
    weights = random_weights(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=257))
    return Subject(weights, real_text(weights, 20_000), steps=12, prompts=3, new_tokens=20)
