"""Shared by all tests: eight virtual CPU devices, a small text, a small configuration."""

import errno
import gc
import os
import tempfile
from pathlib import Path

import pytest

# Read by JAX when it is first used; set here without importing it, so that the reference's tests run without JAX.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Compiling is the slowest thing the tests do, in child processes too. The programs are tiny, and what they compute
# doesn't hang on how fast they run; and many tests compile the same one.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The models are tiny, and two processes of tests share the cores: PyTorch's threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tracing makes objects by the million and few cycles: looking for cycles less often saves a tenth of the time.
gc.set_threshold(100_000)
_CACHE = tempfile.TemporaryDirectory(prefix="gpt2-jax-test-cache-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

from gpt2_core.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig  # noqa: E402
from gpt2_core.runs.folder import RunFolder  # noqa: E402

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 15 kB of English, the same on every machine."""
    path = tmp_path_factory.mktemp("text") / "license.txt"
    path.write_text((ROOT / "LICENSE").read_text() * 14, encoding="utf-8")
    return path


@pytest.fixture
def make_config(tmp_path, text_file):
    """A tiny run on the text file; keyword arguments override, `model=` and `optimizer=` too."""

    def make(name: str = "run", **overrides) -> TrainConfig:
        settings = {
            "model": MODEL,
            "data": DataConfig("text", str(text_file), "bytes", cache_dir=str(tmp_path / "tokens")),
            "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
            "steps": 6,
            "batch_size": 8,
            "precision": "float32",
            "run_dir": str(tmp_path / name),
            "log_interval": 1,
            "eval_interval": 100,
            "eval_sequences": 16,
            "checkpoint_interval": 3,
        }
        return TrainConfig(**settings | overrides)

    return make


@pytest.fixture
def train_with_full_disk(make_config, monkeypatch):
    """Train a run of 6 steps with a checkpoint every 2, of which the first `failures` can't be put in their place."""

    def run(train, checkpoints, failures: int) -> RunFolder:
        publish, left = checkpoints.publish, iter([True] * failures)

        def failing(*paths):
            if next(left, False):
                raise OSError(errno.ENOSPC, "No space left on device")
            publish(*paths)

        monkeypatch.setattr(checkpoints, "publish", failing)
        return train(make_config(steps=6, checkpoint_interval=2))

    return run
