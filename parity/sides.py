"""The two models from one set of weights, each behind the functions that its own trainer uses."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
# The dropout masks of a forward pass in order of computation: for each site one array or, of attention weights, one for
# each block of queries. 1 is kept, 0 dropped, -1 not to be seen.
Sites = list[list[np.ndarray]]

# LLVM contracts and vectorises a fused loop by what is in it, and a value that is asked for is not fused away: its
# optimisations are off where a forward pass is compared to the bit with and without capture. The program that training
# compiles is compared by its logits, gradients and curves. What only draws random numbers needs none either.
PLAIN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """PyTorch computes on one thread inside: threads of tiny tensors wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        kernel = choose_kernel("auto", precision=dtype, model=self.config)
        norm = choose_norm_kernel("auto", precision=dtype, norm=self.config.norm)
        self.definition = define(weights.config, Execution(dtype, kernel, norm=norm))
        self.params = from_canonical(weights, self.definition.execution.param_dtype)
        self._generator = gpt2_jax.generate.Generator(self.definition)
        self._steps: dict[TrainConfig, tuple] = {}

    @functools.cached_property
    def _logits(self):
        return jax.jit(lambda params, tokens_BT: self.definition.merge(params)(tokens_BT))

    @functools.cached_property
    def _plain_logits(self):
        return jax.jit(lambda params, tokens_BT: self.definition.merge(params)(tokens_BT), compiler_options=PLAIN)

    def plain_logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits compiled as `intermediates` are, for a comparison to the bit."""
        return np.asarray(self._plain_logits(self.params, tokens_BT))

    @functools.cached_property
    def _loss_and_grads(self):
        return jax.jit(functools.partial(gpt2_jax.train_step.loss_and_grads, self.definition))

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits(self.params, tokens_BT))

    def intermediates(self, tokens_BT: np.ndarray) -> Arrays:
        """Every tapped value of a forward pass, the logits last, in order of computation."""
        names: list[str] = []

        @functools.partial(jax.jit, compiler_options=PLAIN)
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
        definition, optimizer, step = self._train_step(_compiled_settings(config))
        state = gpt2_jax.train_step.initial_state(definition, optimizer, mesh, seed=config.seed, params=self.params)

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
                state, metrics = step(state, *on_device, np.asarray(rate, definition.execution.param_dtype))
            yield Step(float(metrics.loss), float(metrics.grad_norm), canonical, embedding)

    def _train_step(self, config: TrainConfig):
        """The definition, the optimizer and the step that `config` asks for, compiled once for this side."""
        if config not in self._steps:
            kernel = choose_kernel(config.attention, precision=config.precision, model=config.model)
            definition = define(config.model, Execution(config.precision, kernel, config.scan_layers, config.remat))
            optimizer = gpt2_jax.train_step.make_optimizer(config.optimizer, config.model)
            step = gpt2_jax.train_step.make_train_step(definition, config, make_mesh(parse_mesh(config.mesh)))
            self._steps[config] = definition, optimizer, step
        return self._steps[config]

    def dropout_masks(self, config: TrainConfig, batches: Sequence[Batch]) -> list[list[Sites]]:
        """The masks that the train step draws at each step, for each part of its batch."""
        masks = _dropout_masks(define(config.model, Execution(config.precision)))

        def of_step(step: int, batch: Batch) -> list[Sites]:
            return [
                _by_site(map(np.asarray, masks(self.params, *part))) for part in _dropout_parts(config, step, batch)
            ]

        return [of_step(step, batch) for step, batch in enumerate(batches)]

    def dropped_intermediates(self, config: TrainConfig, batch: Batch) -> Arrays:
        """The values of the first training step's first part, dropout included, in order of computation."""
        definition = define(config.model, Execution(config.precision))
        names: list[str] = []

        @functools.partial(jax.jit, compiler_options=PLAIN)
        def run(params, keys_B, *part):
            values: dict[str, jax.Array] = {}
            with tapping(record(values)):
                definition.merge(params).loss(*part, dropout_keys_B=keys_B)
            names[:] = [name for name in values if not name.endswith("dropout_mask")]
            return values

        values = run(self.params, *_dropout_parts(config, 0, batch)[0])
        return {name: np.asarray(values[name]) for name in names}

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

        @functools.partial(jax.jit, compiler_options=PLAIN)
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


def _compiled_settings(config: TrainConfig) -> TrainConfig:
    """`config` without what a train step is given at each call: runs that differ in their schedule share a program."""
    schedule = {"learning_rate": 1.0, "warmup_steps": 0, "final_fraction": 1.0}
    return dataclasses.replace(config, steps=1, optimizer=dataclasses.replace(config.optimizer, **schedule))


def _dropout_parts(config: TrainConfig, step: int, batch: Batch) -> list[tuple]:
    """The dropout keys, inputs and targets of each part that a train step computes at once."""
    parts = [x.reshape(config.accumulation, -1, x.shape[-1]) for x in batch]
    keys_AB = gpt2_jax.train_step.dropout_keys(config.seed, step, parts[0].shape[:2])
    return list(zip(keys_AB, *parts, strict=True))


def _dropout_masks(definition: Definition):
    """(params, keys_B, inputs_BT, targets_BT) -> the masks that a training pass draws, in order of computation."""

    # What is compiled is integer arithmetic, the same bits at any level of optimisation.
    @functools.partial(jax.jit, compiler_options=PLAIN)
    def masks(params, keys_B, inputs_BT, targets_BT):
        found: list[jax.Array] = []

        def keep(name, value):
            if name.endswith("dropout_mask"):
                found.append(value)
            return value

        with tapping(keep):
            definition.merge(params).loss(inputs_BT, targets_BT, dropout_keys_B=keys_B)
        return found

    return masks


def _by_site(masks: Iterable[np.ndarray]) -> Sites:
    """Masks in order of computation by site: those of attention weights, (B, H, queries, keys), follow one another."""
    groups = itertools.groupby(masks, key=lambda mask: mask.ndim == 4)
    return [site for weights, found in groups for site in ([list(found)] if weights else [[mask] for mask in found])]


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
        values: dict[str, torch.Tensor] = {}
        with _Recorder(self.model, values.__setitem__), self._autocast():
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
        model = self._training_model(config)
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

    def dropout_masks(
        self, config: TrainConfig, batches: Sequence[Batch], *, rank: int = 0, processes: int = 1
    ) -> tuple[list[list[Sites]], float]:
        """The masks that PyTorch itself draws in training, likewise, in one of several processes; and how far what it
        makes of a kept element is from the element over 1 - rate, relatively."""
        model = self._training_model(config)

        def of_step(step: int, batch: Batch) -> tuple[list[Sites], float]:
            torch.manual_seed(gpt2_torch.train.dropout_seed(config.seed, step, rank, processes))
            with _DrawnMasks() as drawn:
                gpt2_torch.train.accumulate_gradients(model, *_tensors(batch), accumulation=config.accumulation)
            count = math.ceil(len(drawn.masks) / config.accumulation)
            sites = [[mask] for mask in drawn.masks]
            return [sites[i * count : (i + 1) * count] for i in range(config.accumulation)], drawn.scale_error

        steps, errors = zip(*itertools.starmap(of_step, enumerate(batches)), strict=True)
        return list(steps), max(errors)

    def dropped_intermediates(self, config: TrainConfig, batch: Batch, masks: Sequence[Sites]) -> Arrays:
        """The values of the first part of a step, PyTorch given the masks of each part."""
        model = self._training_model(config)
        part = Batch(*(x[: len(x) // config.accumulation] for x in batch))
        values: dict[str, torch.Tensor] = {}
        with torch.no_grad(), _GivenMasks(masks[:1]), _Recorder(model, values.__setitem__):
            model(*_tensors(part))
        return {name: _to_numpy(value) for name, value in values.items()}

    def _training_model(self, config: TrainConfig) -> torch.nn.Module:
        """A model of these weights that drops out as `config` says."""
        model = type(self.model)(config.model).to(DEVICE, next(self.model.parameters()).dtype)
        model.load_state_dict(self.model.state_dict())
        return model.train()

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
    """Dropout with given masks: the sites of each part of the batch, in order of computation."""

    def __init__(self, parts: Sequence[Sites]) -> None:
        super().__init__()
        self._sites = iter([site for part in parts for site in part])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            p, training = _dropout_options(args, kwargs)
            return _dropped(args[0], next(self._sites)[0], p) if training and p > 0 else args[0]
        if function is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            q, k, v = args
            scores, bias = q @ k.mT / math.sqrt(q.shape[-1]), kwargs.get("attn_mask")
            if bias is None:
                bias = torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype, device=q.device).triu(1)
            scores = scores + bias
            mask = _joined(next(self._sites), scores.shape)
            return _dropped(scores.softmax(dim=-1), mask, kwargs["dropout_p"]) @ v
        return function(*args, **kwargs)


class _DrawnMasks(TorchFunctionMode):
    """Sees the masks that dropout draws, in order of computation, and whether what is kept is scaled by them."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[np.ndarray] = []
        self.scale_error = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            p, training = _dropout_options(args, kwargs)
            if training and p > 0:
                return self._seen(lambda x: function(x, p, training), torch.ones_like(args[0]), p, args[0])
        if function is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            q, k, v = args
            # With the identity as values attention gives back its weights, dropped or not.
            identity = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:-1], -1)
            weights = function(q, k, identity, **kwargs | {"dropout_p": 0.0})
            return self._seen(lambda v: function(q, k, v, **kwargs), identity, kwargs["dropout_p"], v, weights)
        return function(*args, **kwargs)

    def _seen(self, drop, probe: torch.Tensor, p: float, x: torch.Tensor, undropped: torch.Tensor | None = None):
        """drop(x), after the same draw has been applied to what shows the mask."""
        undropped = probe if undropped is None else undropped
        with torch.random.fork_rng(), torch.no_grad():
            shown = drop(probe)
        mask = torch.where(undropped != 0, (shown != 0).to(torch.int8), -1)
        expected = undropped * (mask == 1) / (1.0 - p)
        self.scale_error = max(self.scale_error, ((shown - expected).abs() / expected.abs().max()).max().item())
        self.masks.append(_to_numpy(mask))
        return drop(x)


def _dropout_options(args, kwargs) -> tuple[float, bool]:
    return args[1:3] if len(args) > 2 else (kwargs["p"], kwargs["training"])


def _joined(blocks: list[np.ndarray], shape: torch.Size) -> np.ndarray:
    """The mask (B, H, T, T) of attention weights: JAX draws one for each block of queries, over its keys."""
    whole, rows = np.zeros(shape, bool), 0
    for mask in blocks:
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
