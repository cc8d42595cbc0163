"""The PyTorch reference behind the functions that its own trainer uses."""

import functools
import itertools
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import gpt2_torch.generate
import gpt2_torch.model
import gpt2_torch.optimizer
import gpt2_torch.spikes
import gpt2_torch.train
import gpt2_torch.weights
from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.config.io import to_yaml
from gpt2_core.data.batches import Batch
from gpt2_core.runs.folder import RunFolder
from gpt2_core.sampling import Sampling
from gpt2_core.spikes import window
from gpt2_core.weights import Weights
from gpt2_torch.weights import build
from parity.gpt2.adapters.protocol import (
    Arrays,
    Masks,
    Sites,
    State,
    Step,
    Trained,
    Trainer,
    TrainerState,
    copied,
    trained,
)
from parity.gpt2.adapters.torch_modes import DrawnMasks, GivenMasks, Recorder


class TorchAdapter:
    """The PyTorch reference, by default in float64 on the CPU."""

    name = "PyTorch"
    container = "state dict"
    """What holds its weights in memory."""

    def __init__(self, weights: Weights, dtype: str = "float64", device: str = "cpu") -> None:
        self.weights, self.config, self.dtype, self.device = weights, weights.config, dtype, device

    def make(self, weights: Weights, dtype: str = "float64") -> "TorchAdapter":
        return TorchAdapter(weights, dtype, self.device)

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        weights = self.weights.astype(np.float64 if self.dtype == "float64" else np.float32)
        return build(weights).to(self.device)

    def module(self) -> torch.nn.Module:
        """The model as a user would build it, for `parity.compare`."""
        return build(self.weights.astype(np.float32))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    @torch.no_grad()
    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        with self._autocast():
            logits = self.model(self._on_device(tokens_BT))
        return _to_numpy(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    @torch.no_grad()
    def intermediates(self, tokens_BT: np.ndarray) -> Arrays:
        """The values of a forward pass by the names that the JAX model gives them."""
        values: dict[str, torch.Tensor] = {}
        with Recorder(self.model, values.__setitem__):
            logits = self.model(self._on_device(tokens_BT))
        return {name: _to_numpy(value) for name, value in values.items()} | {"logits": _to_numpy(logits)}

    @torch.no_grad()
    def dtypes(self, tokens_BT: np.ndarray) -> dict[str, str]:
        """The dtype of the same values, as training computes them."""
        values: dict[str, torch.Tensor] = {}
        with Recorder(self.model, values.__setitem__), self._autocast():
            self.model(self._on_device(tokens_BT))
        return {name: str(value.dtype).removeprefix("torch.") for name, value in values.items()}

    def loss_and_grads(self, batch: Batch, accumulation: int) -> tuple[float, Arrays]:
        """The loss of a batch and its gradients by canonical name and shape."""
        self.model.zero_grad(set_to_none=True)
        loss = gpt2_torch.train.accumulate_gradients(
            self.model, *self._tensors(batch), accumulation=accumulation, autocast=self._autocast()
        )
        grads = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return loss.item(), self._canonical(grads)

    def activation_grads(self, batch: Batch, accumulation: int = 1) -> Arrays:
        """The gradient of the loss with respect to the same values, as the trainer's own `accumulate_gradients`
        computes it, summed over the parts of the batch."""
        grads: dict[str, torch.Tensor] = {}

        def watch(name: str, value: torch.Tensor) -> None:
            def add(grad: torch.Tensor) -> None:
                grads[name] = grads[name] + grad if name in grads else grad

            value.register_hook(add)

        with Recorder(self.model, watch):
            gpt2_torch.train.accumulate_gradients(self.model, *self._tensors(batch), accumulation=accumulation)
        self.model.zero_grad(set_to_none=True)
        return {name: _to_numpy(grad) for name, grad in grads.items()}

    def train(self, config: TrainConfig, batches: Sequence[Batch]) -> Trained:
        """The trainer's own steps from the weights as given."""
        return trained(self.steps(config, batches))

    def train_with_masks(self, config: TrainConfig, batches: Sequence[Batch], masks: Sequence[list[Sites]]) -> Trained:
        """The same with these dropout masks instead of random ones."""
        return trained(self._given_steps(config, batches, masks))

    def steps(self, config: TrainConfig, batches: Sequence[Batch]) -> Iterator[Step]:
        """The trainer's own steps, one at a time."""
        return self._given_steps(config, batches, [[]] * len(batches))

    def _given_steps(
        self, config: TrainConfig, batches: Sequence[Batch], masks: Sequence[list[Sites]]
    ) -> Iterator[Step]:
        model = self._training_model(config)
        optimizer = gpt2_torch.optimizer.make_optimizer(model, config.optimizer)
        named = dict(model.named_parameters())

        def canonical() -> State:
            states = {name: optimizer.state[p] for name, p in named.items()}
            moments = ({name: s[key] for name, s in states.items()} for key in ("exp_avg", "exp_avg_sq"))
            return State(*map(copied, map(self._canonical, (named, *moments))))

        for number, batch in enumerate(batches):
            with GivenMasks(masks[number]):
                loss, norm = gpt2_torch.train.train_step(
                    model,
                    optimizer,
                    *self._tensors(batch),
                    learning_rate=gpt2_torch.train.learning_rate(number, config.steps, config.optimizer),
                    clip_norm=config.optimizer.clip_norm,
                    accumulation=config.accumulation,
                )
            yield Step(loss.item(), norm.item(), canonical, lambda: _to_numpy(model.wte.weight.detach()).copy())

    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
        """New tokens, shape (prompts, tokens)."""
        return np.array(list(gpt2_torch.generate.generate(self.model, prompts, uniforms, sampling))).T

    def loss_limits(self, losses: np.ndarray, deviations: float) -> np.ndarray:
        """The limit that training has for each of these losses, one after the other."""
        losses_W, found = torch.tensor(window([]), dtype=torch.float64), []
        for loss in torch.from_numpy(losses):
            found.append(float(gpt2_torch.spikes.loss_limit(losses_W, deviations)))
            losses_W = gpt2_torch.spikes.with_loss(losses_W, loss)
        return np.array(found)

    def sample(self, logits_BV: np.ndarray, uniforms_B: np.ndarray, sampling: Sampling) -> np.ndarray:
        """Next tokens (B,)."""
        given = (torch.from_numpy(x.copy()) for x in (logits_BV, uniforms_B))
        return gpt2_torch.generate.sample(*given, sampling).numpy()

    def dropout_masks(self, config: TrainConfig, batches: Sequence[Batch]) -> Masks:
        """The masks that PyTorch itself draws in training, and how exactly what is kept is scaled."""
        model = self._training_model(config)

        def of_step(step: int, batch: Batch) -> tuple[list[Sites], float]:
            torch.manual_seed(gpt2_torch.train.dropout_seed(config.seed, step, 0, 1))
            with DrawnMasks() as drawn:
                gpt2_torch.train.accumulate_gradients(model, *self._tensors(batch), accumulation=config.accumulation)
            count = math.ceil(len(drawn.masks) / config.accumulation)
            sites = [[mask] for mask in drawn.masks]
            return [sites[i * count : (i + 1) * count] for i in range(config.accumulation)], drawn.scale_error

        steps, errors = zip(*itertools.starmap(of_step, enumerate(batches)), strict=True)
        return Masks(list(steps), max(errors))

    def dropout_seeds(self, seed: int, steps: int, processes: int) -> dict[tuple[int, int], int]:
        """What each process of a run seeds its generator with before each step, by step and process."""
        places = itertools.product(range(steps), range(processes))
        return {(s, rank): gpt2_torch.train.dropout_seed(seed, s, rank, processes) for s, rank in places}

    @torch.no_grad()
    def intermediates_with_masks(self, config: TrainConfig, batch: Batch, masks: Sequence[Sites]) -> Arrays:
        """The values of the first part of a step, given the masks of each part."""
        model = self._training_model(config)
        part = Batch(*(x[: len(x) // config.accumulation] for x in batch))
        values: dict[str, torch.Tensor] = {}
        with GivenMasks(masks[:1]), Recorder(model, values.__setitem__):
            model(*self._tensors(part))
        return {name: _to_numpy(value) for name, value in values.items()}

    # --- what training is made of

    def learning_rate(self, step: int, steps: int, config: OptimizerConfig) -> float:
        """The rate that the trainer asks for at a step."""
        return gpt2_torch.train.learning_rate(step, steps, config)

    def applied_decay(self, weight_decay: float) -> dict[str, float]:
        """Of each tensor its decay over the learning rate, from an update whose gradients are all zero."""
        model, rate = build(self.weights.astype(np.float64)), 0.5
        before = self._canonical({n: p.detach().clone() for n, p in model.named_parameters()})
        optimizer = gpt2_torch.optimizer.make_optimizer(
            model, OptimizerConfig(weight_decay=weight_decay, learning_rate=rate)
        )
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        after = self._canonical(dict(model.named_parameters()))
        decay = {n: (before[n] - after[n]) / rate for n in before}
        return {n: float(np.linalg.norm(decay[n]) / np.linalg.norm(before[n])) for n in before}

    def trainer(self) -> Trainer:
        """The command's `train`, looked up when it is called: a planted mistake may have replaced it."""
        return Trainer(self.name, lambda *arguments: gpt2_torch.train.train(*arguments), _state_of_checkpoint)

    def trainer_of_processes(self) -> Trainer | str:
        """The same by two processes, or why they can't be run here."""
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            return "this PyTorch has no gloo"
        if self.device != "cpu":
            return "each needs a GPU of its own; compared on CPU"
        return Trainer(f"{self.name} by two processes", _by_two_processes, _state_of_checkpoint)

    # --- weights

    def round_trip(self, weights: Weights) -> Weights:
        """Weights through a state dict and back, in their own dtype."""
        state = build(weights).state_dict()
        return gpt2_torch.weights.to_canonical(state, weights.config, "torch", weights.tokenizer)

    def initialize(self, config: ModelConfig, seed: int) -> Arrays:
        """The weights that the framework's own initialisers draw."""
        torch.manual_seed(seed)
        return gpt2_torch.weights.canonical_arrays(gpt2_torch.model.GPT2(config).state_dict(), config)

    def _training_model(self, config: TrainConfig) -> torch.nn.Module:
        """A model of these weights that drops out as `config` says."""
        model = type(self.model)(config.model).to(self.device, next(self.model.parameters()).dtype)
        model.load_state_dict(self.model.state_dict())
        return model.train()

    def _canonical(self, state) -> Arrays:
        return gpt2_torch.weights.canonical_arrays(state, self.config)

    def _tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self._on_device(part) for part in batch)

    def _on_device(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device, torch.long)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _state_of_checkpoint(checkpoint: Path, config: TrainConfig) -> TrainerState:
    model = gpt2_torch.model.GPT2(config.model).double()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    adamw = gpt2_torch.optimizer.make_optimizer(model, config.optimizer)
    adamw.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu"))
    (updates,) = {int(of_parameter["step"]) for of_parameter in adamw.state.values()}
    return state_of(model, adamw, updates)


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> TrainerState:
    """What a checkpoint of this model and this AdamW would hold."""
    named = dict(model.named_parameters())
    moments = ({n: optimizer.state[p][kind] for n, p in named.items()} for kind in ("exp_avg", "exp_avg_sq"))
    # Copied: the next update changes the parameters in place.
    trees = (gpt2_torch.weights.canonical_arrays(tree, model.config) for tree in (named, *moments))
    return TrainerState(updates, *map(copied, trees))


def _by_two_processes(config: TrainConfig, initial: Callable) -> RunFolder:
    """As torchrun starts them, on this machine; raises RuntimeError with what they said if one of them fails."""
    recipe = Path(config.run_dir).with_suffix(".yaml")
    recipe.write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _PROCESS, str(recipe)],
                env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
            for rank in range(2)
        ]
        try:
            # One that fails leaves the other waiting for it.
            while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(process.returncode for process in processes):
            said.seek(0)
            raise RuntimeError(f"the PyTorch trainer by two processes ended with an error: {said.read()[-2000:]}")
    return RunFolder(Path(config.run_dir))


_PROCESS = """
import sys
from pathlib import Path
from gpt2_core.config.io import from_yaml
from gpt2_torch.train import train
from gpt2_convert import read_initial_weights
train(from_yaml(Path(sys.argv[1])), read_initial_weights)
"""
