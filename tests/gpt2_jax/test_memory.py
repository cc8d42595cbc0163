import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_jax import memory
from gpt2_jax.memory import bytes_needed, memory_errors
from gpt2_jax.train import train
from gpt2_jax.train_step import make_program


@pytest.fixture
def limit(monkeypatch):
    """Make devices as small as told."""

    def limit(available):
        monkeypatch.setattr(memory, "bytes_available", lambda mesh, processes: available)

    return limit


@pytest.mark.slow
def test_too_large_a_batch_ends_with_what_would_fit_and_it_does(mesh_config, limit, tmp_path):
    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)
    config = mesh_config(model=model, batch_size=96, mesh=2)

    def needed(**changes):
        return bytes_needed(make_program(dataclasses.replace(config, **changes)).compile_train_step())

    available = needed(batch_size=40) + 1000
    limit(available)
    with pytest.raises(UserError, match="out of memory: --batch_size 96 .* 48 sequences .* 2 devices") as found:
        train(config)
    batch, parts = map(int, re.search(r"--batch_size (\d+) or --accumulation (\d+)$", str(found.value)).groups())
    del found  # and with its traceback the run's lock
    # Interpolated: at most a pair of sequences from the largest that fits.
    assert 38 <= batch <= 40 and needed(batch_size=batch) <= available
    assert needed(accumulation=parts) <= available < needed(accumulation=parts - 1)
    # The failed run is no hindrance to the one that takes the advice.
    train(dataclasses.replace(config, accumulation=parts, steps=1))


@pytest.mark.long
def test_xlas_own_error_becomes_the_sentence(mesh_config, limit):
    config = mesh_config()
    limit(1000)
    with (
        pytest.raises(UserError, match="out of memory: .* not even one sequence fits"),
        memory_errors(make_program(config)),
    ):
        jax.block_until_ready(jnp.ones(1 << 50, jnp.int8))


def test_other_errors_pass(mesh_config):
    config = mesh_config()
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory_errors(make_program(config)),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
