"""A compiled training of either framework, made of the trainers' own functions, and the options that configure it."""

import contextlib
import dataclasses
import time
from typing import Any, Literal

import numpy as np

from gpt2_core.cli import Parser
from gpt2_core.config import ModelConfig, TrainConfig
from gpt2_core.data.batches import Batch
from gpt2_core.errors import UserError
from gpt2_core.weights.layouts import JAX

_RATE = 1e-4


class JaxTraining:
    """A compiled step and its state; `work(steps)` runs steps and returns the last one's loss.

    `cached`: use JAX's compilation cache; `compile_seconds` may then be the time to load the program.
    """

    def __init__(self, config: TrainConfig, *, cached: bool = False) -> None:
        import jax

        if config.device == "cpu":
            jax.config.update("jax_platforms", "cpu")
        from gpt2_jax.runtime import configure, has_accelerator

        configure(config.precision, config.mesh)
        jax.config.update("jax_enable_compilation_cache", cached)
        if config.device == "cuda" and not has_accelerator():
            raise UserError("--device cuda: JAX finds no GPU here; use --device cpu")
        from gpt2_jax.train import resolve
        from gpt2_jax.train_step import make_program

        self.config = config = resolve(config)
        self.program = make_program(config)
        jax.set_mesh(self.program.mesh)
        self.state = self.program.initial_state()
        self._batch = self.program.put_batch(_batch(config))
        self._rate = np.asarray(_RATE, self.program.definition.execution.param_dtype)
        begin = time.perf_counter()
        self.step = self.program.compile_train_step()
        self.compile_seconds = time.perf_counter() - begin

    def work(self, steps: int) -> float:
        for _ in range(steps):
            self.state, metrics = self.step(self.state, *self._batch, self._rate)
        return float(metrics.loss)


class TorchTraining:
    """The same for the reference. `attention` is one of PyTorch's kernels; auto leaves the choice to PyTorch."""

    def __init__(self, config: TrainConfig, *, compile: bool, attention: str = "auto") -> None:
        import torch

        from gpt2_torch.model import GPT2
        from gpt2_torch.optimizer import make_optimizer
        from gpt2_torch.runtime import pick_device, resolve, set_matmul_precision

        self.device = device = pick_device(config.device)
        self.config = config = dataclasses.replace(resolve(config, device, 1), compile=compile)
        set_matmul_precision(config.precision)
        torch.manual_seed(0)
        # JAX's model pads its vocabulary, which speeds matrix products up; users of PyTorch do it in the configuration.
        rows = config.model.vocab_size + -config.model.vocab_size % JAX.vocabulary_multiple
        model = dataclasses.replace(config.model, vocab_size=rows)
        self.model = GPT2(model).to(device, torch.float64 if config.precision == "float64" else torch.float32)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self._attention = attention
        self._run = torch.compile(self.model) if compile else self.model
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
        self._batch = [torch.from_numpy(part).to(device, torch.long) for part in _batch(config)]
        begin = time.perf_counter()
        self.work(1)
        self.compile_seconds = time.perf_counter() - begin if compile else 0.0

    def work(self, steps: int) -> float:
        from gpt2_torch.train import train_step

        with _attention_kernel(self._attention):
            for _ in range(steps):
                loss, _ = train_step(
                    self._run,
                    self.optimizer,
                    *self._batch,
                    learning_rate=_RATE,
                    clip_norm=self.config.optimizer.clip_norm,
                    accumulation=self.config.accumulation,
                    autocast=self._autocast,
                )
        return loss.item()


def _attention_kernel(name: str) -> contextlib.AbstractContextManager:
    if name == "auto":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel({"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[name])


def add_options(parser: Parser, *, preset: str | None, batch: int, device: str = "auto") -> None:
    """Add the options of a training; sizes left out are those of `preset`, or of ModelConfig if it is None."""
    parser.add_class_arguments(ModelConfig, "model")
    left_out = f"Left out: {preset}." if preset else "Left out: a small model."
    parser.add_argument("--preset", type=str, help=f"Sizes of a published model. {left_out}")
    parser.add_argument("--batch", type=int, default=batch, help="Sequences a step.")
    parser.add_argument("--accumulation", type=int, default=1, help="Parts a step is computed in.")
    parser.add_argument(
        "--precision",
        type=Literal["auto", "float32", "tf32", "bfloat16", "float64"],
        default="auto",
        help="As the trainers': auto is bfloat16 on an accelerator and float32 on CPU.",
    )
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default=device, help="Where to compute.")
    parser.add_argument(
        "--attention", type=Literal["auto", "cudnn", "recompute", "xla"], default="auto", help="JAX's kernel."
    )
    parser.add_argument(
        "--norm_kernel", type=Literal["auto", "triton", "xla"], default="auto", help="JAX's layer norm kernel."
    )
    parser.add_argument("--scan_layers", type=bool, default=False, help="JAX: scan the layers.")
    parser.add_argument("--remat", type=bool, default=False, help="JAX: recompute activations.")


def add_json(parser: Parser) -> None:
    """Add the option --json."""
    parser.add_argument("--json", type=str, help="File to write the results to, with command, machine and versions.")


def configuration(options: Any) -> TrainConfig:
    """The training that parsed options ask for, on one device."""
    return TrainConfig(
        model=ModelConfig(**{f.name: options.model[f.name] for f in dataclasses.fields(ModelConfig)}),
        batch_size=options.batch,
        accumulation=options.accumulation,
        precision=options.precision,
        mesh=1,
        attention=options.attention,
        norm_kernel=options.norm_kernel,
        scan_layers=options.scan_layers,
        remat=options.remat,
        device=options.device,
    )


def _batch(config: TrainConfig) -> Batch:
    shape = (config.batch_size, config.tokens_per_sequence + 1)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return Batch(ids[:, :-1], ids[:, 1:])
