"""The JAX model behind the functions that its own trainer uses."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import gpt2_jax.attention
import gpt2_jax.generate
import gpt2_jax.loss
import gpt2_jax.norm_kernels
import gpt2_jax.optimizer
import gpt2_jax.spikes
import gpt2_jax.train
import gpt2_jax.train_step
import gpt2_jax.weights
from gpt2_core.config import IGNORE_INDEX, ModelConfig, OptimizerConfig, ResolvedConfig, TrainConfig, resolved
from gpt2_core.data.batches import Batch
from gpt2_core.sampling import Sampling
from gpt2_core.spikes import window
from gpt2_core.weights import Weights
from gpt2_jax import checkpoints
from gpt2_jax.attention import choose_kernel
from gpt2_jax.capture import record, tapping
from gpt2_jax.definition import Definition, define
from gpt2_jax.mesh import check_mesh, parse_mesh
from gpt2_jax.model import Execution, padded_vocab_size
from gpt2_jax.norm_kernels import choose_norm_kernel
from gpt2_jax.runtime import matmul_precision, why_not_ampere
from gpt2_jax.train_step import Program
from gpt2_jax.weights import from_canonical
from parity.engine import dataflow
from parity.gpt2.adapters.jax_capture import PLAIN, Perturbed, abstract_values, captured
from parity.gpt2.adapters.jax_dropout import by_site, drawn_masks, dropout_parts
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
    joined,
    trained,
)


@dataclasses.dataclass(frozen=True)
class _Programs:
    """What is compiled for one architecture in one dtype, whatever the weights."""

    definition: Definition

    @functools.cached_property
    def logits(self):
        return jax.jit(lambda params, tokens_BT: self.definition.merge(params)(tokens_BT))

    @functools.cached_property
    def plain_logits(self):
        return jax.jit(lambda params, tokens_BT: self.definition.merge(params)(tokens_BT), compiler_options=PLAIN)

    @functools.cached_property
    def loss_and_grads(self):
        return jax.jit(functools.partial(gpt2_jax.train_step.loss_and_grads, self.definition))

    @functools.cached_property
    def generator(self):
        return gpt2_jax.generate.Generator(self.definition)


class JaxAdapter:
    """The JAX model, by default in float64, where JAX computes."""

    name = "JAX"
    container = "parameters"
    """What holds its weights in memory."""

    def __init__(self, weights: Weights, dtype: str = "float64", programs: _Programs | None = None) -> None:
        self.weights, self.config, self.dtype = weights, weights.config, dtype
        self._given = programs
        self._trainings: dict[TrainConfig, Program] = {}
        self._initializers: dict[tuple[ModelConfig, str], Callable] = {}
        self._masks: dict[tuple[ModelConfig, str], Callable] = {}

    def make(self, weights: Weights, dtype: str = "float64") -> "JaxAdapter":
        """Of one architecture and dtype what is compiled is shared."""
        shared = (weights.config, dtype) == (self.config, self.dtype)
        return JaxAdapter(weights, dtype, self._programs if shared else None)

    @property
    def device(self) -> str:
        """As the PyTorch trainer's `--device` calls it."""
        return "cpu" if jax.default_backend() == "cpu" else "cuda"

    # What only some checks need is made when it is asked for.

    @functools.cached_property
    def _programs(self) -> _Programs:
        if self._given is not None:
            return self._given
        config, dtype = self.config, self.dtype
        kernel = choose_kernel("auto", precision=dtype, model=config)
        norm = choose_norm_kernel("auto", precision=dtype, norm=config.norm)
        return _Programs(define(config, Execution(dtype, kernel, norm=norm)))

    @property
    def definition(self) -> Definition:
        return self._programs.definition

    @functools.cached_property
    def params(self) -> Arrays:
        """The weights in the shapes of gpt2_jax."""
        return from_canonical(self.weights, self.definition.execution.param_dtype)

    def plain_logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits compiled as `intermediates` are, for a comparison to the bit."""
        return np.asarray(self._programs.plain_logits(self.params, tokens_BT))

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits (B, T, V) as training compiles them."""
        return np.asarray(self._programs.logits(self.params, tokens_BT))

    def intermediates(self, tokens_BT: np.ndarray) -> Arrays:
        """Every tapped value of a forward pass, the logits last, in order of computation."""
        return captured(self._forward, self.params, tokens_BT)

    def dtypes(self, tokens_BT: np.ndarray) -> dict[str, str]:
        """The dtype of every tapped value of a forward pass."""
        return {name: x.dtype.name for name, x in abstract_values(self._forward, self.params, tokens_BT).items()}

    def loss_and_grads(self, batch: Batch, accumulation: int) -> tuple[float, Arrays]:
        """The loss of a batch and its gradients by canonical name and shape."""
        parts = [x.reshape(accumulation, -1, x.shape[-1]) for x in batch]
        loss, grads = self._programs.loss_and_grads(self.params, *parts)
        return float(loss), self._canonical(grads)

    def activation_grads(self, batch: Batch, accumulation: int = 1) -> Arrays:
        """The gradient of the loss with respect to every tapped value, in order of computation: as the train step's own
        `loss_and_grads` computes it, summed over the parts of the batch."""
        parts = [jnp.asarray(x.reshape(accumulation, -1, x.shape[-1])) for x in batch]

        def loss(params, *batch):
            return self.definition.merge(params).loss(*batch)

        of_part = abstract_values(loss, self.params, *(x[0] for x in parts))
        params = {"params": self.params, "zeros": {n: jnp.zeros(x.shape, x.dtype) for n, x in of_part.items()}}
        # Parameters have their gradients compiled as training compiles them; these only tell where those part.
        compute = functools.partial(gpt2_jax.train_step.loss_and_grads, Perturbed(self.definition))
        run = jax.jit(compute, compiler_options=PLAIN)
        grads = run(params, *parts)[1]["zeros"]
        return {name: np.asarray(grads[name]) for name in of_part}

    def train(self, config: TrainConfig, batches: Sequence[Batch]) -> Trained:
        """The trainer's own steps, on the mesh and in the way that `config` says, from the weights as given."""
        return trained(self.steps(config, batches))

    def steps(self, config: TrainConfig, batches: Sequence[Batch]) -> Iterator[Step]:
        """The same, one at a time."""
        training = self._training(_compiled_settings(config))
        state = training.initial_state(self.params)

        def canonical() -> State:
            trees = (state.params, state.opt_state[0].mu, state.opt_state[0].nu)
            return State(*map(copied, map(self._canonical, trees)))

        def embedding() -> np.ndarray:
            return np.array(state.params["wte.weight"][: self.config.vocab_size])

        for number, batch in enumerate(batches):
            rate = gpt2_jax.train.learning_rate(number, config.steps, config.optimizer)
            # Set for this step alone: between two steps the caller computes without the mesh.
            with jax.set_mesh(training.mesh):
                rate = np.asarray(rate, training.definition.execution.param_dtype)
                state, metrics = training.train_step(state, *training.put_batch(batch), rate)
            yield Step(float(metrics.loss), float(metrics.grad_norm), canonical, embedding)

    def _training(self, config: TrainConfig) -> Program:
        """What `config` asks to train, compiled once for this adapter."""
        if config not in self._trainings:
            kernel = choose_kernel(config.attention, precision=config.precision, model=config.model)
            run = resolved(config, attention=kernel, norm_kernel="xla")
            self._trainings[config] = gpt2_jax.train_step.make_program(run)
        return self._trainings[config]

    def dropout_masks(self, config: TrainConfig, batches: Sequence[Batch]) -> Masks:
        """The masks that the train step draws at each step, for each part of its batch."""
        key = config.model, config.precision
        if key not in self._masks:
            self._masks[key] = drawn_masks(define(config.model, Execution(config.precision)))
        masks = self._masks[key]

        def of_step(step: int, batch: Batch) -> list[Sites]:
            return [by_site(map(np.asarray, masks(self.params, *part))) for part in dropout_parts(config, step, batch)]

        return Masks([of_step(step, batch) for step, batch in enumerate(batches)], None)

    def dropped_intermediates(self, config: TrainConfig, batch: Batch) -> Arrays:
        """The values of the first training step's first part, dropout included, in order of computation."""
        definition = define(config.model, Execution(config.precision))

        def loss(params, keys_B, *part):
            return definition.merge(params).loss(*part, dropout_keys_B=keys_B)

        values = captured(loss, self.params, *dropout_parts(config, 0, batch)[0])
        return {name: value for name, value in values.items() if not name.endswith("dropout_mask")}

    def generate(self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
        """New tokens, shape (prompts, tokens)."""
        return np.array(list(self._programs.generator(self.params, prompts, uniforms, sampling))).T

    def sample(self, logits_BV: np.ndarray, uniforms_B: np.ndarray, sampling: Sampling) -> np.ndarray:
        """Next tokens (B,)."""
        sample = jax.jit(gpt2_jax.generate.sample, static_argnums=2)
        return np.asarray(sample(logits_BV, uniforms_B, sampling))

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

    def generate_until(
        self, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling, end_of_text: int
    ) -> np.ndarray:
        """The same, stopping when every prompt has had its end of text."""
        return np.array(
            list(self._programs.generator(self.params, prompts, uniforms, sampling, end_of_text=end_of_text))
        ).T

    # --- what training is made of

    def learning_rate(self, step: int, steps: int, config: OptimizerConfig) -> float:
        """The rate that the trainer asks for at a step."""
        return gpt2_jax.train.learning_rate(step, steps, config)

    def applied_decay(self, weight_decay: float) -> dict[str, float]:
        """Of each tensor its decay over the learning rate, from an update whose gradients are all zero."""
        optimizer = gpt2_jax.train_step.make_optimizer(OptimizerConfig(weight_decay=weight_decay), self.config)
        zeros = jax.tree.map(np.zeros_like, self.params)
        updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(self.params), self.params)
        decay, of = self._canonical(updates), self._canonical(self.params)
        return {n: float(np.linalg.norm(decay[n]) / np.linalg.norm(of[n])) for n in of}

    def devices(self) -> int:
        """How many devices a mesh can have."""
        return len(jax.devices())

    def devices_of(self, mesh: str | int) -> int:
        """How many devices a mesh has that is written so."""
        return math.prod(parse_mesh(mesh).values())

    def check_mesh(self, config: TrainConfig) -> None:
        """Raises UserError if the model or the batch doesn't fit the mesh."""
        check_mesh(parse_mesh(config.mesh), config)

    def evaluate(self, config: TrainConfig, batch: Batch) -> float:
        """The trainer's own evaluation of a batch, on the mesh and in the way that `config` says: the mean loss."""
        program = gpt2_jax.train_step.make_program(resolved(config, norm_kernel="xla"))
        with jax.set_mesh(program.mesh):
            total = program.eval_step(self.params, *batch)
        return float(total) / int((batch.targets != IGNORE_INDEX).sum())

    def trainer(self) -> Trainer:
        """The command's `train`, looked up when it is called: a planted mistake may have replaced it."""
        return Trainer(self.name, lambda *arguments: gpt2_jax.train.train(*arguments), _state_of_checkpoint)

    # --- parts that decide something by a size

    def attention_blocks(self) -> tuple[int, int]:
        """The shortest length whose queries are computed in blocks, and in how many."""
        return gpt2_jax.attention.SHORTEST_IN_BLOCKS, gpt2_jax.attention.BLOCKS

    def attended(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        dout: np.ndarray,
        *,
        kernel: str,
        rate: float,
        slopes: tuple[float, ...] | None = None,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Causal attention of (B, H, T, K), its gradients of q, k and v, and which weights (B, H, T, T) were kept.
        `slopes` are those of ALiBi's biases."""
        keys_B = jax.random.split(jax.random.key(0), len(q)) if rate > 0 else None

        @jax.jit
        def run(q, k, v):
            masks: list[jax.Array] = []

            def keep(name, value):
                masks.append(value)
                return value

            def attend(q, k, v):
                return gpt2_jax.attention.causal_attention(q, k, v, kernel=kernel, rate=rate, key=keys_B, slopes=slopes)

            with tapping(keep):
                attend(q, k, v)
            out, pull = jax.vjp(attend, q, k, v)
            return (out, *pull(dout)), masks

        values, masks = run(q, k, v)
        shape = (*q.shape[:3], q.shape[2])
        kept = joined([np.asarray(mask) for mask in masks], shape) if masks else np.ones(shape, bool)
        return list(map(np.asarray, values)), kept

    def normed_by_kernel(
        self, x: np.ndarray, branch: np.ndarray | None, w: np.ndarray, b: np.ndarray | None, epsilon: float, douts
    ) -> list[np.ndarray]:
        """x + branch and its layer norm by the kernel for GPUs, in float32, and the gradients of what is given.

        `douts` are those of the two. Pallas interprets it where there is no such GPU. It runs as few programs, so that
        each has several rows and the last one fewer.
        """
        given = [None if a is None else jnp.asarray(a, jnp.float32) for a in (x, branch, w, b)]
        kernels = gpt2_jax.norm_kernels
        interpreted = mock.patch.object(kernels, "INTERPRET", why_not_ampere() is not None)
        with interpreted, mock.patch.object(kernels, "BACKWARD_PROGRAMS", 3):

            @jax.jit
            def run(given, douts):
                outs, pull = jax.vjp(lambda *a: kernels.add_layer_norm(*a, epsilon, jnp.float32), *given)
                return *outs, *pull(douts)

            found = run(given, tuple(jnp.asarray(dout, jnp.float32) for dout in douts))
        return [np.asarray(a, np.float64) for a in found if a is not None]

    def vocabulary_rows(self, vocab_size: int) -> int:
        """Rows of the embedding's table, with those that pad it."""
        return padded_vocab_size(vocab_size)

    def loss_chunks(self, size: int) -> contextlib.AbstractContextManager:
        """Inside, the loss is computed in chunks of so many bytes."""
        return mock.patch.object(gpt2_jax.loss, "CHUNK_BYTES", size)

    def cross_entropy(
        self, x_BTD: np.ndarray, head_VD: np.ndarray, targets_BT: np.ndarray, vocab_size: int, *, divisor: float
    ) -> list[np.ndarray]:
        """The summed loss over `divisor`, evaluated and differentiated, and its gradients of x and the head."""

        def loss(x_BTD, head_VD):
            return gpt2_jax.loss.summed_cross_entropy(x_BTD, head_VD, targets_BT, vocab_size) / divisor

        evaluated = jax.jit(loss)(x_BTD, head_VD)
        trained, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x_BTD, head_VD)
        return list(map(np.asarray, (evaluated, trained, *grads)))

    def loss_limits(self, losses: np.ndarray, deviations: float) -> np.ndarray:
        """The limit that training has for each of these losses, one after the other."""

        def step(losses_W, loss):
            limit = gpt2_jax.spikes.loss_limit(losses_W, deviations)
            return gpt2_jax.spikes.with_loss(losses_W, loss), limit

        return np.asarray(jax.lax.scan(step, jnp.asarray(window([])), losses)[1])

    def min_slots(self) -> int:
        """The fewest slots that a KV cache has."""
        return gpt2_jax.generate.MIN_SLOTS

    def few_slots(self, slots: int) -> contextlib.AbstractContextManager:
        """Inside, a KV cache begins with so many slots at least."""
        return mock.patch.object(gpt2_jax.generate, "MIN_SLOTS", slots)

    # --- weights

    def round_trip(self, weights: Weights) -> Weights:
        """Weights through the parameters and back, in their own dtype."""
        params = from_canonical(weights, weights.arrays["wte.weight"].dtype)
        return gpt2_jax.weights.to_canonical(params, weights.config, "jax", weights.tokenizer)

    def initialize(self, config: ModelConfig, seed: int) -> Arrays:
        """The weights that the framework's own initialisers draw."""
        return gpt2_jax.weights.canonical_arrays(self._initialized(config, seed), config)

    def padding_values(self, config: ModelConfig, seed: int) -> int:
        """How many values in the rows that pad the vocabulary aren't zero at initialisation."""
        params = self._initialized(config, seed)
        tables = [params[name] for name in ("wte.weight", "lm_head.weight") if name in params]
        return sum(np.count_nonzero(table[config.vocab_size :]) for table in tables)

    def changed_by_precision(self, config: ModelConfig, seed: int) -> list[str]:
        """The tensors that are drawn otherwise in float32 than in float64."""
        with jax.enable_x64(False):
            single = self._initialized(config, seed, "float32")
        return _unequal(single, self._initialized(config, seed))

    def changed_by_mesh(self, config: ModelConfig, seed: int, mesh: str) -> list[str]:
        """The tensors that are drawn otherwise where they are born on a mesh."""
        run = ResolvedConfig(
            model=config, precision="float64", seed=seed, mesh=mesh, attention="xla", norm_kernel="xla"
        )
        state = gpt2_jax.train_step.make_program(run).initial_state()
        return _unequal(state.params, self._initialized(config, seed))

    def _initialized(self, config: ModelConfig, seed: int, dtype: str = "float64") -> Arrays:
        if (config, dtype) not in self._initializers:
            initialize = jax.jit(define(config, Execution(dtype)).initialize, compiler_options=PLAIN)
            self._initializers[config, dtype] = initialize
        return {name: np.asarray(x) for name, x in self._initializers[config, dtype](jax.random.key(seed)).items()}

    # --- traced programs

    def program(self, batch: Batch, **execution: bool) -> dataflow.Graph:
        """Of logits, loss and gradients, in this order; the batch in two parts, whose gradients are added up."""
        definition = define(self.config, dataclasses.replace(self.definition.execution, **execution))
        inputs, targets = (jnp.asarray(x).reshape(2, -1, x.shape[-1]) for x in batch)

        def compute(params, inputs, targets):
            loss, grads = gpt2_jax.train_step.loss_and_grads(definition, params, inputs, targets)
            return (definition.merge(params)(inputs[0]), loss), grads

        with jax.default_matmul_precision(matmul_precision(self.dtype)):
            return dataflow.trace(compute, self.params, inputs, targets)

    def step_program(self, config: TrainConfig) -> dataflow.Graph:
        """Of a train step on the mesh that `config` says."""
        training = gpt2_jax.train_step.make_program(resolved(config, norm_kernel="xla"))
        tokens = jax.ShapeDtypeStruct((1, config.batch_size, config.tokens_per_sequence), np.int32)
        rate = jax.ShapeDtypeStruct((), np.float32)
        with jax.set_mesh(training.mesh):
            return dataflow.trace(training.train_step, training.abstract_state, tokens, tokens, rate)

    def _forward(self, params, tokens_BT: jax.Array) -> jax.Array:
        return self.definition.merge(params)(tokens_BT)

    def _canonical(self, params) -> Arrays:
        return gpt2_jax.weights.canonical_arrays(params, self.config)


def _compiled_settings(config: TrainConfig) -> TrainConfig:
    """`config` without what a train step is given at each call: runs that differ in their schedule share a program."""
    schedule = {"learning_rate": 1.0, "warmup_steps": 0, "final_fraction": 1.0}
    return dataclasses.replace(config, steps=1, optimizer=dataclasses.replace(config.optimizer, **schedule))


def _unequal(found: Arrays, expected: Arrays) -> list[str]:
    """The tensors that are others, beyond the last digits of the float32 in which they are drawn."""
    return [n for n in expected if not np.allclose(found[n], expected[n], rtol=1e-5, atol=0.0, equal_nan=False)]


def _state_of_checkpoint(checkpoint: Path, config: TrainConfig) -> TrainerState:
    program = gpt2_jax.train_step.make_program(gpt2_jax.train.resolve(config))
    state = checkpoints.restore(checkpoint, program.abstract_state)
    trees = (state.params, state.opt_state[0].mu, state.opt_state[0].nu)
    return TrainerState(int(state.step), *(gpt2_jax.weights.canonical_arrays(tree, config.model) for tree in trees))
