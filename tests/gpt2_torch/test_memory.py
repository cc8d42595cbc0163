import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2_core.errors import UserError
from gpt2_torch.memory import bytes_needed, memory_errors
from gpt2_torch.train import train

# Beside the planner's word, how much a real process grows; a small step first has the libraries' own memory in it.
PROGRAM = """
import torch
from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.memory import peak_memory
from gpt2_torch.memory import bytes_needed
from gpt2_torch.model import GPT2
from gpt2_torch.optimizer import make_optimizer
from gpt2_torch.train import train_step

def after(model, sequences):
    model = GPT2(model)
    optimizer = make_optimizer(model, OptimizerConfig())
    tokens = torch.zeros((sequences, 256), dtype=torch.long)
    train_step(model, optimizer, tokens, tokens, learning_rate=1e-3, clip_norm=1.0)
    return peak_memory()

config = TrainConfig(ModelConfig(4, 4, 256, 256, 8192), precision="float32")
few, many = after(config.model, 2), after(config.model, 14)
print((many - few) / (bytes_needed(config, "cpu", 14, 1) - bytes_needed(config, "cpu", 2, 1)))
"""


@pytest.mark.long
def test_a_process_grows_as_planned():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1.0, abs=0.15)


def test_parts_cost_a_buffer_of_gradients_and_processes_another(make_config):
    config = make_config()
    parameters = 4 * config.model.parameter_count
    one, two, three = (bytes_needed(config, "cpu", 1, parts) for parts in (1, 2, 3))
    assert two == three and one < two <= one + parameters
    assert bytes_needed(config, "cpu", 1, 1, processes=2) == one + parameters


def test_a_split_model_leaves_most_of_its_state_to_the_other_processes(make_config):
    config = make_config(model=dataclasses.replace(make_config().model, n_layer=12, n_embd=128))
    whole = bytes_needed(config, "cpu", 1, 1, processes=8)
    split = bytes_needed(dataclasses.replace(config, fsdp=True), "cpu", 1, 1, processes=8)
    # Parameters, gradients and both moments, and DDP's second copy of the gradients, without what is gathered.
    state = 4 * 4 * config.model.parameter_count
    assert whole - split == pytest.approx(state * 7 / 8 + state / 4, rel=0.1)


@pytest.mark.long
def test_running_out_of_memory_ends_with_a_sentence(make_config, monkeypatch):
    config = make_config(batch_size=64)
    monkeypatch.setattr("gpt2_torch.memory.host_memory", lambda: bytes_needed(config, "cpu", 20, 1))
    with (
        pytest.raises(UserError, match=r"out of memory: --batch_size 64 .*: --batch_size 20 or --accumulation 4$"),
        memory_errors(config, torch.device("cpu"), 1),
    ):
        torch.empty(1 << 60, dtype=torch.int8)


@pytest.mark.long
def test_a_step_that_the_system_would_kill_is_refused_before_anything_is_written(make_config, monkeypatch):
    config = make_config(batch_size=64)
    needed = bytes_needed(dataclasses.replace(config, precision="float32"), "cpu", 20, 1)
    monkeypatch.setattr("gpt2_torch.memory.host_memory", lambda: needed)
    with pytest.raises(UserError, match=r"out of memory: --batch_size 64 .*: --batch_size 20 or --accumulation 4$"):
        train(config)
    assert not Path(config.run_dir).exists()


def test_other_errors_pass(make_config):
    with (
        pytest.raises(RuntimeError, match="something else"),
        memory_errors(make_config(), torch.device("cpu"), 1),
    ):
        raise RuntimeError("something else")
