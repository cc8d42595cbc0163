"""The memory that a conversion takes, measured on a model that is larger than everything else in the process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_convert import FORMATS
from gpt2_convert.canonical import write as write_safetensors
from gpt2_core.config import PRESETS, ModelConfig
from gpt2_core.weights import LazyArrays, LazyTensor, Weights

ROOT = Path(__file__).parents[2]
# Beside the model and its largest tensor: the interpreter, the frameworks, what their allocators keep back.
OVERHEAD = 0.6e9


def synthetic(config: ModelConfig) -> Weights:
    """Weights made as they are asked for, so that the test itself never holds them."""
    generator = np.random.default_rng(0)

    def make(shape):
        return lambda: generator.standard_normal(shape, dtype=np.float32)

    stored = {n: LazyTensor(s, np.dtype(np.float32), make(s)) for n, s in config.parameter_shapes.items()}
    return Weights(config, LazyArrays(stored), "synthetic weights")


def peak_memory(folder: Path, *arguments: str) -> int:
    """Largest resident set of a conversion, in bytes, mapped files included."""
    program = "import sys, convert, gpt2_core.memory as m; convert.main(sys.argv[1:]); print(m.peak_memory())"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_holds_the_model_once_and_one_tensor_more(tmp_path):
    config = ModelConfig(**PRESETS["gpt2-medium"], mlp="gelu_tanh")
    model = 4 * config.parameter_count
    largest = 4 * config.vocab_size * config.n_embd
    write_safetensors(synthetic(config), tmp_path / "safetensors.safetensors")
    peaks = {}
    for to in FORMATS:
        if to != "safetensors":
            peaks["safetensors", to] = peak_memory(tmp_path, "safetensors.safetensors", f"{to}.safetensors", "--to", to)
    for source in FORMATS:
        peaks[source, "jax"] = peak_memory(tmp_path, f"{source}.safetensors", "again", "--to", "jax", "--force")
        peaks[source, "hf"] = peak_memory(tmp_path, f"{source}.safetensors", "again", "--to", "hf", "--force")
    for (source, to), peak in peaks.items():
        assert peak <= model + largest + OVERHEAD, (source, to, peak)
        if to in ("hf", "llmc", "torch"):  # written tensor by tensor
            assert peak <= 2 * largest + OVERHEAD, (source, to, peak)
