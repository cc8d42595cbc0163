"""The two models in float64 from one set of weights, each behind the functions that its own trainer uses."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import torch

import gpt2_jax.generate
import gpt2_torch.generate
from gpt2_core.batches import Batch
from gpt2_core.config import TrainConfig
from gpt2_core.sampling import Sampling
from gpt2_core.schedule import learning_rate
from gpt2_core.weights import Weights
from gpt2_jax.model import Execution, define
from gpt2_jax.optimizer import make_optimizer as make_jax_optimizer
from gpt2_jax.sharding import make_mesh
from gpt2_jax.train_step import initial_state, loss_and_grads, make_train_step, put_batch
from gpt2_jax.weights import from_canonical
from gpt2_jax.weights import to_canonical as jax_to_canonical
from gpt2_torch.train import accumulate_gradients, make_optimizer, train_step
from gpt2_torch.weights import build
from gpt2_torch.weights import to_canonical as torch_to_canonical

Grads = dict[str, np.ndarray]


class JaxSide:
    """The JAX model on one device."""

    def __init__(self, weights: Weights) -> None:
        self.config = weights.config
        self.definition = define(weights.config, Execution("float64"))
        self.params = from_canonical(weights, "float64")
        self._generator = gpt2_jax.generate.Generator(self.definition)

    @functools.cached_property
    def _logits(self):
        return jax.jit(lambda params, tokens_BT: self.definition.merge(params)(tokens_BT))

    @functools.cached_property
    def _loss_and_grads(self):
        return jax.jit(functools.partial(loss_and_grads, self.definition))

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits(self.params, tokens_BT))

    def loss_and_grads(self, batch: Batch, accumulation: int) -> tuple[float, Grads]:
        """The loss of a batch and its gradients by canonical name and shape."""
        parts = [x.reshape(accumulation, -1, x.shape[-1]) for x in batch]
        loss, grads = self._loss_and_grads(self.params, *parts)
        return float(loss), _arrays(jax_to_canonical(grads, self.config, "gradients", None))

    def train(self, config: TrainConfig, batches: Sequence[Batch]) -> Iterator[tuple[float, float]]:
        """Loss and gradient norm of each step, from the weights as they were given."""
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
        optimizer = make_jax_optimizer(config.optimizer, config.model)
        state = initial_state(self.definition, optimizer, mesh, seed=config.seed, params=self.params)
        step = make_train_step(self.definition, config, mesh)
        with jax.set_mesh(mesh):
            for number, batch in enumerate(batches):
                rate = np.float64(learning_rate(number, config.steps, config.optimizer))
                state, metrics = step(state, *put_batch(batch, config.accumulation, mesh), rate)
                yield float(metrics.loss), float(metrics.grad_norm)

    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
        """New tokens, shape (prompts, tokens)."""
        return np.array(list(self._generator(self.params, prompts, uniforms, sampling))).T


class TorchSide:
    """The PyTorch reference on the CPU."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights.astype(np.float64)
        self.config = weights.config
        self.model = build(self.weights)

    @torch.no_grad()
    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(tokens_BT).long()).numpy()

    def loss_and_grads(self, batch: Batch, accumulation: int) -> tuple[float, Grads]:
        """The loss of a batch and its gradients by canonical name and shape."""
        self.model.zero_grad(set_to_none=True)
        loss = accumulate_gradients(self.model, *_tensors(batch), accumulation=accumulation)
        grads = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return loss.item(), _arrays(torch_to_canonical(grads, self.config, "gradients", None))

    def train(self, config: TrainConfig, batches: Sequence[Batch]) -> Iterator[tuple[float, float]]:
        """Loss and gradient norm of each step, from the weights as they were given."""
        model = build(self.weights).train()
        optimizer = make_optimizer(model, config.optimizer)
        for number, batch in enumerate(batches):
            rate = learning_rate(number, config.steps, config.optimizer)
            loss, norm = train_step(
                model,
                optimizer,
                *_tensors(batch),
                learning_rate=rate,
                clip_norm=config.optimizer.clip_norm,
                accumulation=config.accumulation,
            )
            yield loss.item(), norm.item()

    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
        """New tokens, shape (prompts, tokens)."""
        return np.array(list(gpt2_torch.generate.generate(self.model, prompts, uniforms, sampling))).T


def _arrays(weights: Weights) -> Grads:
    return dict(weights.arrays)


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(part).long() for part in batch)
