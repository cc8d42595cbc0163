"""The two models from one set of weights, each behind the functions that its own trainer uses."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import gpt2_jax.generate
import gpt2_jax.optimizer
import gpt2_jax.train
import gpt2_jax.train_step
import gpt2_jax.weights
import gpt2_torch.generate
import gpt2_torch.optimizer
import gpt2_torch.train
import gpt2_torch.weights
from gpt2_core.batches import Batch
from gpt2_core.config import TrainConfig, parse_mesh
from gpt2_core.sampling import Sampling
from gpt2_core.weights import Weights
from gpt2_jax.attention import choose_kernel
from gpt2_jax.capture import perturb, record, tapping
from gpt2_jax.model import Definition, Execution, define
from gpt2_jax.norm_kernels import choose_norm_kernel
from gpt2_jax.sharding import make_mesh
from gpt2_jax.weights import from_canonical
from gpt2_torch.weights import build

Arrays = dict[str, np.ndarray]

# LLVM contracts and vectorises a fused loop by what is in it, and a value that is asked for is not fused away: its
# optimisations are off where a forward pass is compared to the bit with and without capture. The program that training
# compiles is compared by its logits, gradients and curves.
_PLAIN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Where the PyTorch side computes; compare.py sets it. JAX computes where JAX does.
DEVICE = torch.device("cpu")


class State(NamedTuple):
    """What a training step changes, by canonical name."""

    params: Arrays
    first_moments: Arrays
    second_moments: Arrays


class Step(NamedTuple):
    """One training step: what it reports, and the state that it leads to, to be read before the next step."""

    loss: float
    grad_norm: float
    state: Callable[[], State]
    embedding: Callable[[], np.ndarray]
    """The token embedding alone."""


class Trained(NamedTuple):
    """What a few training steps gave: a row a step, and the state they led to."""

    losses: np.ndarray
    grad_norms: np.ndarray
    params: Arrays
    first_moments: Arrays
    second_moments: Arrays
    watched: list[np.ndarray]
    """The token embedding after each step."""


def _copied(arrays: Arrays) -> Arrays:
    """The next step writes into the memory of the state that it is given."""
    return {name: array.copy() for name, array in arrays.items()}


def _trained(steps: Iterator[Step]) -> Trained:
    rows, watched = [], []
    for step in steps:
        rows.append((step.loss, step.grad_norm))
        watched.append(step.embedding())
    return Trained(*np.array(rows).T, *step.state(), watched)


class JaxSide:
    """The JAX model, by default in float64."""

    def __init__(self, weights: Weights, dtype: str = "float64") -> None:
        self.config = weights.config
        kernel = choose_kernel("auto", precision=dtype, dropout=self.config.dropout, head_size=self.config.head_size)
        norm = choose_norm_kernel("auto", precision=dtype, norm=self.config.norm)
        self.definition = define(weights.config, Execution(dtype, kernel, norm=norm))
        self.params = from_canonical(weights, self.definition.execution.param_dtype)
        self._generator = gpt2_jax.generate.Generator(self.definition)

    @functools.cached_property
    def _logits(self):
        return jax.jit(lambda params, tokens_BT: self.definition.merge(params)(tokens_BT))

    def plain_logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits compiled as `intermediates` are, for a comparison to the bit."""
        logits = jax.jit(lambda p, t: self.definition.merge(p)(t), compiler_options=_PLAIN)
        return np.asarray(logits(self.params, tokens_BT))

    @functools.cached_property
    def _loss_and_grads(self):
        return jax.jit(functools.partial(gpt2_jax.train_step.loss_and_grads, self.definition))

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits(self.params, tokens_BT))

    def intermediates(self, tokens_BT: np.ndarray) -> Arrays:
        """Every tapped value of a forward pass, the logits last, in order of computation."""
        names: list[str] = []

        @functools.partial(jax.jit, compiler_options=_PLAIN)
        def run(params, tokens_BT):
            values: dict[str, jax.Array] = {}
            with tapping(record(values)):
                self.definition.merge(params)(tokens_BT)
            names[:] = values
            return values

        values = run(self.params, tokens_BT)
        return {name: np.asarray(values[name]) for name in names}

    def dtypes(self, tokens_BT: np.ndarray) -> dict[str, str]:
        """The dtype of every tapped value of a forward pass."""

        def run(params, tokens_BT):
            values: dict[str, jax.Array] = {}
            with tapping(record(values)):
                self.definition.merge(params)(tokens_BT)
            return values

        return {name: value.dtype.name for name, value in jax.eval_shape(run, self.params, tokens_BT).items()}

    def loss_and_grads(self, batch: Batch, accumulation: int) -> tuple[float, Arrays]:
        """The loss of a batch and its gradients by canonical name and shape."""
        parts = [x.reshape(accumulation, -1, x.shape[-1]) for x in batch]
        loss, grads = self._loss_and_grads(self.params, *parts)
        return float(loss), self._canonical(grads)

    def activation_grads(self, batch: Batch, accumulation: int = 1) -> Arrays:
        """The gradient of the loss with respect to every tapped value, in order of computation: as the train step's own
        `loss_and_grads` computes it, summed over the parts of the batch."""
        parts = [jnp.asarray(x.reshape(accumulation, -1, x.shape[-1])) for x in batch]
        order: list[str] = []

        def shapes(params, inputs_BT, targets_BT):
            values: dict[str, jax.Array] = {}
            with tapping(record(values)):
                self.definition.merge(params).loss(inputs_BT, targets_BT)
            order[:] = values
            return values

        of_part = jax.eval_shape(shapes, self.params, *(x[0] for x in parts))
        params = {"params": self.params, "zeros": {n: jnp.zeros(s.shape, s.dtype) for n, s in of_part.items()}}
        run = jax.jit(functools.partial(gpt2_jax.train_step.loss_and_grads, _Perturbed(self.definition)))
        grads = run(params, *parts)[1]["zeros"]
        return {name: np.asarray(grads[name]) for name in order}

    def train(self, config: TrainConfig, batches: Sequence[Batch]) -> Trained:
        """The trainer's own steps, on the mesh and in the way that `config` says, from the weights as given."""
        return _trained(self.steps(config, batches))

    def steps(self, config: TrainConfig, batches: Sequence[Batch]) -> Iterator[Step]:
        """The same, one at a time."""
        mesh = make_mesh(parse_mesh(config.mesh))
        model = config.model
        kernel = choose_kernel(
            config.attention, precision=config.precision, dropout=model.dropout, head_size=model.head_size
        )
        execution = Execution(config.precision, kernel, config.scan_layers, config.remat)
        definition = define(config.model, execution)
        optimizer = gpt2_jax.train_step.make_optimizer(config.optimizer, config.model)
        state = gpt2_jax.train_step.initial_state(definition, optimizer, mesh, seed=config.seed, params=self.params)
        step = gpt2_jax.train_step.make_train_step(definition, config, mesh)

        def canonical() -> State:
            trees = (state.params, state.opt_state[0].mu, state.opt_state[0].nu)
            return State(*map(_copied, map(self._canonical, trees)))

        def embedding() -> np.ndarray:
            return np.array(state.params["wte.weight"][: self.config.vocab_size])

        for number, batch in enumerate(batches):
            rate = gpt2_jax.train.learning_rate(number, config.steps, config.optimizer)
            # Set for this step alone: between two steps the caller computes without the mesh.
            with jax.set_mesh(mesh):
                on_device = gpt2_jax.train_step.put_batch(batch, config.accumulation, mesh)
                state, metrics = step(state, *on_device, np.asarray(rate, execution.param_dtype))
            yield Step(float(metrics.loss), float(metrics.grad_norm), canonical, embedding)

    def dropout_masks(self, config: TrainConfig, batches: Sequence[Batch]) -> list[list[list[np.ndarray]]]:
        """The masks that the train step draws at each step, for each part of its batch, in order of computation."""
        definition = define(config.model, Execution("float64"))

        @jax.jit
        def masks(params, keys_B, inputs, targets):
            found: list[jax.Array] = []

            def keep(name, value):
                if name.endswith("dropout_mask"):
                    found.append(value)
                return value

            with tapping(keep):
                definition.merge(params).loss(inputs, targets, dropout_keys_B=keys_B)
            return found

        def of_step(step: int, batch: Batch) -> list[list[np.ndarray]]:
            parts = [x.reshape(config.accumulation, -1, x.shape[-1]) for x in batch]
            keys_AB = gpt2_jax.train_step.dropout_keys(config.seed, step, parts[0].shape[:2])
            return [
                [np.asarray(mask) for mask in masks(self.params, keys_B, *part)]
                for keys_B, *part in zip(keys_AB, *parts, strict=True)
            ]

        return [of_step(step, batch) for step, batch in enumerate(batches)]

    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
        """New tokens, shape (prompts, tokens)."""
        return np.array(list(self._generator(self.params, prompts, uniforms, sampling))).T

    def sample(self, logits_BV: np.ndarray, uniforms_B: np.ndarray, sampling: Sampling) -> np.ndarray:
        """Next tokens (B,)."""
        return np.asarray(gpt2_jax.generate.sample(jnp.asarray(logits_BV), jnp.asarray(uniforms_B), sampling))

    def decoded_logits(self, tokens_BT: np.ndarray, pieces: Sequence[int]) -> np.ndarray:
        """Logits (B, T, V) with the tokens given to the cache in pieces of these lengths."""

        @jax.jit
        def run(params, caches, tokens_BT, start_B):
            model = self.definition.merge(params)
            x_BTD, caches = model.decode(tokens_BT, start_B, caches)
            return {"logits": model.logits(x_BTD)}, caches

        return self._decoded(run, tokens_BT, pieces)["logits"]

    def decoded_intermediates(self, tokens_BT: np.ndarray, pieces: Sequence[int]) -> Arrays:
        """Every tapped value of the same, in order of computation."""
        names: list[str] = []

        @functools.partial(jax.jit, compiler_options=_PLAIN)
        def run(params, caches, tokens_BT, start_B):
            values: dict[str, jax.Array] = {}
            model = self.definition.merge(params)
            with tapping(record(values)):
                x_BTD, caches = model.decode(tokens_BT, start_B, caches)
                model.logits(x_BTD)
            names[:] = values
            return values, caches

        values = self._decoded(run, tokens_BT, pieces)
        return {name: values[name] for name in names}

    def _decoded(self, run: Callable, tokens_BT: np.ndarray, pieces: Sequence[int]) -> Arrays:
        """The values of all pieces, side by side along T, which is the last axis but one."""
        caches = self.definition.empty_caches(len(tokens_BT), self.config.block_size)
        found, start = [], 0
        for length in pieces:
            start_B = np.full(len(tokens_BT), start, np.int32)
            values, caches = run(self.params, caches, tokens_BT[:, start : start + length], start_B)
            found.append(values)
            start += length
        return {name: np.concatenate([np.asarray(v[name]) for v in found], axis=-2) for name in found[0]}

    def _canonical(self, params) -> Arrays:
        return gpt2_jax.weights.canonical_arrays(params, self.config)


class TorchSide:
    """The PyTorch reference, by default in float64."""

    def __init__(self, weights: Weights, dtype: str = "float64") -> None:
        self.weights = weights.astype(np.float64 if dtype == "float64" else np.float32)
        self.config = weights.config
        self.model = build(self.weights).to(DEVICE)
        self._autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16")

    @torch.no_grad()
    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        with self._autocast():
            logits = self.model(_on_device(tokens_BT))
        return _to_numpy(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    @torch.no_grad()
    def intermediates(self, tokens_BT: np.ndarray) -> Arrays:
        """The values of a forward pass by the names that the JAX model gives them."""
        values: dict[str, torch.Tensor] = {}
        with _Recorder(self.model, values.__setitem__):
            logits = self.model(_on_device(tokens_BT))
        return {name: _to_numpy(value) for name, value in values.items()} | {"logits": _to_numpy(logits)}

    @torch.no_grad()
    def dtypes(self, tokens_BT: np.ndarray) -> dict[str, str]:
        """The dtype of the same values, as training computes them."""
        with _Recorder(self.model) as values, self._autocast():
            self.model(_on_device(tokens_BT))
        return {name: str(value.dtype).removeprefix("torch.") for name, value in values.items()}

    def loss_and_grads(self, batch: Batch, accumulation: int) -> tuple[float, Arrays]:
        """The loss of a batch and its gradients by canonical name and shape."""
        self.model.zero_grad(set_to_none=True)
        loss = gpt2_torch.train.accumulate_gradients(
            self.model, *_tensors(batch), accumulation=accumulation, autocast=self._autocast()
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

        with _Recorder(self.model, watch):
            gpt2_torch.train.accumulate_gradients(self.model, *_tensors(batch), accumulation=accumulation)
        self.model.zero_grad(set_to_none=True)
        return {name: _to_numpy(grad) for name, grad in grads.items()}

    def train(self, config: TrainConfig, batches: Sequence[Batch], masks: Sequence | None = None) -> Trained:
        """The trainer's own steps from the weights as given; with `masks`, those in the place of random dropout."""
        return _trained(self.steps(config, batches, masks))

    def steps(self, config: TrainConfig, batches: Sequence[Batch], masks: Sequence | None = None) -> Iterator[Step]:
        """The same, one at a time."""
        model = build(self.weights).to(DEVICE)
        if config.model.dropout > 0:
            with_dropout = type(model)(config.model).to(DEVICE, torch.float64)
            with_dropout.load_state_dict(model.state_dict())
            model = with_dropout
        model.train()
        optimizer = gpt2_torch.optimizer.make_optimizer(model, config.optimizer)
        named = dict(model.named_parameters())

        def canonical() -> State:
            states = {name: optimizer.state[p] for name, p in named.items()}
            moments = ({name: s[key] for name, s in states.items()} for key in ("exp_avg", "exp_avg_sq"))
            return State(*map(_copied, map(self._canonical, (named, *moments))))

        for number, batch in enumerate(batches):
            with _GivenMasks(masks[number] if masks is not None else []):
                loss, norm = gpt2_torch.train.train_step(
                    model,
                    optimizer,
                    *_tensors(batch),
                    learning_rate=gpt2_torch.train.learning_rate(number, config.steps, config.optimizer),
                    clip_norm=config.optimizer.clip_norm,
                    accumulation=config.accumulation,
                )
            yield Step(loss.item(), norm.item(), canonical, lambda: _to_numpy(model.wte.weight.detach()).copy())

    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
        """New tokens, shape (prompts, tokens)."""
        return np.array(list(gpt2_torch.generate.generate(self.model, prompts, uniforms, sampling))).T

    def sample(self, logits_BV: np.ndarray, uniforms_B: np.ndarray, sampling: Sampling) -> np.ndarray:
        """Next tokens (B,)."""
        given = (torch.from_numpy(x.copy()) for x in (logits_BV, uniforms_B))
        return gpt2_torch.generate.sample(*given, sampling).numpy()

    def _canonical(self, state) -> Arrays:
        return gpt2_torch.weights.canonical_arrays(state, self.config)


class _Perturbed:
    """A model's definition whose parameters hold, beside the model's own, a zero for every tapped value, which is added
    to it: what differentiates the loss by the parameters differentiates it by the values."""

    def __init__(self, definition: Definition) -> None:
        self._definition, self.logical_axes = definition, definition.logical_axes

    def merge(self, params) -> SimpleNamespace:
        model = self._definition.merge(params["params"])

        def loss(*batch, **options) -> jax.Array:
            with tapping(perturb(params["zeros"])):
                return model.loss(*batch, **options)

        return SimpleNamespace(loss=loss)


class _Recorder(TorchFunctionMode):
    """Shows `keep` the values of the reference's forward passes, from outside: by hooks on its modules, and by its
    calls of attention."""

    def __init__(self, model: torch.nn.Module, keep: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._model, self._keep, self._handles, self._attentions = model, keep, [], 0

    def __enter__(self) -> None:
        def output(name):
            return lambda _, __, out: self._keep(name, out)

        def input(name):
            return lambda _, args: self._keep(name, args[0])

        modules = dict(self._model.named_modules())
        places = [(modules["drop"], "embeddings", True), (modules["ln_f"], "ln_f", False)]
        for number, block in enumerate(self._model.h):
            h = f"h.{number}."
            places += [
                (block.ln_1, h + "ln_1", False),
                (block.attn.c_proj, h + "attn.out", True),
                (block.attn.c_proj, h + "attn.c_proj", False),
                (block.ln_2, h + "residual_1", True),
                (block.ln_2, h + "ln_2", False),
                (block.mlp.c_fc, h + "mlp.c_fc", False),
                (block.mlp.c_proj, h + "mlp.activation", True),
                (block.mlp.c_proj, h + "mlp.c_proj", False),
                (block, h + "residual_2", False),
            ]
            if hasattr(block.mlp, "c_gate"):
                places.append((block.mlp.c_gate, h + "mlp.c_gate", False))
        for module, name, before in places:
            hook = (
                module.register_forward_pre_hook(input(name)) if before else module.register_forward_hook(output(name))
            )
            self._handles.append(hook)
        super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            for name, value in zip("qkv", args, strict=False):
                self._keep(f"h.{self._attentions % len(self._model.h)}.attn.{name}", value)
            self._attentions += 1
        return function(*args, **(kwargs or {}))


class _GivenMasks(TorchFunctionMode):
    """Dropout with given masks: one list a part of the batch, each in order of computation."""

    def __init__(self, parts: Sequence[Sequence[np.ndarray]]) -> None:
        super().__init__()
        self._masks = iter([mask for part in parts for mask in part])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            p, training = args[1:3] if len(args) > 2 else (kwargs["p"], kwargs["training"])
            return _dropped(args[0], next(self._masks), p) if training and p > 0 else args[0]
        if function is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            q, k, v = args
            future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
            return _dropped(scores.softmax(dim=-1), self._mask_of_weights(scores.shape), kwargs["dropout_p"]) @ v
        return function(*args, **kwargs)

    def _mask_of_weights(self, shape: torch.Size) -> np.ndarray:
        """The mask (B, H, T, T) of attention weights: JAX draws one for each block of queries, over its keys."""
        whole, rows = np.zeros(shape, bool), 0
        while rows < shape[-2]:
            mask = next(self._masks)
            whole[..., rows : rows + mask.shape[-2], : mask.shape[-1]] = mask
            rows += mask.shape[-2]
        return whole


def _dropped(x: torch.Tensor, mask: np.ndarray, p: float) -> torch.Tensor:
    return x * torch.from_numpy(mask.copy()).to(x.device) / (1.0 - p)


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(_on_device(part) for part in batch)


def _on_device(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens)).to(DEVICE, torch.long)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
