"""The JAX trainer: one process, a mesh of devices, one compiled step."""

import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from gpt2_core.batches import IGNORED, TrainingBatches, evaluation_batches
from gpt2_core.config import TrainConfig, accumulate, check_mesh, dtype_of, format_mesh, parse_mesh
from gpt2_core.interrupt import interruptible
from gpt2_core.run_folder import RunFolder, RunPlan, metadata_of, plan_run
from gpt2_core.runlog import RunLog, peak_flops
from gpt2_core.sampling import Sampling, uniforms
from gpt2_core.schedule import learning_rate
from gpt2_core.tokenizer import get_tokenizer
from gpt2_core.tokens import TokenFolder, open_tokens, steps_of
from gpt2_core.weights import Weights
from gpt2_jax.attention import choose_kernel
from gpt2_jax.checkpoints import CheckpointWriter, restore
from gpt2_jax.generate import Generator
from gpt2_jax.memory import check_memory, memory_errors
from gpt2_jax.model import Definition, Execution, define
from gpt2_jax.norm_kernels import choose_norm_kernel
from gpt2_jax.optimizer import make_optimizer
from gpt2_jax.runtime import resolve_mesh, resolve_precision
from gpt2_jax.sharding import make_mesh
from gpt2_jax.train_step import (
    TrainState,
    abstract_state,
    compile_eval_step,
    compile_train_step,
    initial_state,
    put_batch,
)
from gpt2_jax.weights import from_canonical


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what `auto` and left-out options mean on this machine; raises UserError for what it can't do."""
    precision = resolve_precision(config.precision)
    sizes = resolve_mesh(config)
    config = accumulate(config, sizes["data"] * sizes["fsdp"])
    check_mesh(sizes, config)
    model = config.model
    kernel = choose_kernel(config.attention, precision=precision, model=model)
    norm_kernel = choose_norm_kernel(config.norm_kernel, precision=precision, norm=model.norm)
    return dataclasses.replace(
        config, precision=precision, mesh=format_mesh(sizes), attention=kernel, norm_kernel=norm_kernel
    )


def define_model(config: TrainConfig) -> Definition:
    """The model of a resolved configuration."""
    return define(
        config.model,
        Execution(dtype_of(config.precision), config.attention, config.scan_layers, config.remat, config.norm_kernel),
    )


def train(config: TrainConfig, initial: Callable[[TrainConfig], Weights | None] = lambda config: None) -> RunFolder:
    """Train as `config` says; returns the run's folder.

    `initial` reads the weights that a run starts from, where it isn't resumed; None means random ones.
    `gpt2_jax.runtime.configure` must have been called for this precision and mesh.
    """
    config = resolve(config)
    tokens = open_tokens(config)
    config = steps_of(config, tokens)
    plan = plan_run(config, framework="jax", data_digest=tokens.digest)
    config, folder = plan.config, plan.folder
    weights = None if plan.checkpoint else initial(config)
    plan.begin()

    mesh = make_mesh(parse_mesh(config.mesh))
    definition = define_model(config)
    device = jax.devices()[0].device_kind
    peak = peak_flops(device, config.precision)
    log = RunLog(folder, config, start_step=plan.step, peak_flops=peak and peak * mesh.size)
    with memory_errors(config, definition, mesh), jax.set_mesh(mesh), ThreadPoolExecutor(2) as compiler:
        training = compiler.submit(_compile, config, definition, mesh) if plan.step < config.steps else None
        evaluating = compiler.submit(compile_eval_step, config, definition, mesh)
        if plan.checkpoint is not None:
            optimizer = make_optimizer(config.optimizer, config.model)
            state = restore(plan.checkpoint, abstract_state(definition, optimizer, mesh))
        else:
            state = new_state(config, definition, mesh, weights)
        with log:
            log.introduce(
                f"jax {jax.__version__} on {mesh.size} x {device} ({config.mesh}), {config.precision}, "
                f"{config.attention} attention, {config.norm_kernel} layer norm; {config.model.parameter_count:,} "
                f"parameters; {tokens.source}; run "
                f"{folder.path}" + (f", from step {plan.step}" if plan.checkpoint else "")
            )
            _Loop(config, definition, mesh, tokens, folder, log, training, evaluating).run(state, plan)
    return folder


def _compile(config: TrainConfig, definition: Definition, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Compiled, float]:
    """The compiled step, and the seconds that took."""
    begin = time.perf_counter()
    return compile_train_step(config, definition, mesh), time.perf_counter() - begin


def new_state(
    config: TrainConfig, definition: Definition, mesh: jax.sharding.Mesh, initial: Weights | None
) -> TrainState:
    """The state before the first step."""
    params = None if initial is None else from_canonical(initial, definition.execution.param_dtype.name)
    optimizer = make_optimizer(config.optimizer, config.model)
    return initial_state(definition, optimizer, mesh, seed=config.seed, params=params)


class _Loop:
    """The training loop. The device is never waited for: while it computes a step, the host lays out the next batch
    and logs the step before."""

    def __init__(
        self,
        config: TrainConfig,
        definition: Definition,
        mesh: jax.sharding.Mesh,
        tokens: TokenFolder,
        folder: RunFolder,
        log: RunLog,
        training: Future[tuple[jax.stages.Compiled, float]] | None,
        evaluating: Future[jax.stages.Compiled],
    ) -> None:
        self.config, self.definition, self.mesh, self.tokens = config, definition, mesh, tokens
        self.folder, self.log, self.training, self.evaluating = folder, log, training, evaluating
        self.generator = Generator(definition)
        self.writer = CheckpointWriter(folder, config.keep_checkpoints)
        self.batches = TrainingBatches(
            tokens.train, block_size=config.model.block_size, batch_size=config.batch_size, seed=config.seed
        )

    def run(self, state: TrainState, plan: RunPlan) -> None:
        config, start = self.config, plan.step
        try:
            if start < config.steps:
                train_step = self.compiled_step()
            if plan.checkpoint is None:
                self.evaluate(state, 0)
            if start < config.steps:
                batch = self.put(start)
            waiting = None
            for step in interruptible(range(start, start if self.log.reached_target else config.steps)):
                rate = learning_rate(step, config.steps, config.optimizer)
                state, metrics = train_step(state, *batch, self.scalar(rate))
                if step + 1 < config.steps:
                    batch = self.put(step + 1)
                waiting = self.log_step(waiting)
                if step % config.log_interval == 0 or step + 1 == config.steps:
                    waiting = (step, rate, metrics)
                    if config.target_loss is not None:
                        waiting = self.log_step(waiting)  # whether to go on hangs on it
                done = step + 1
                ends = done == config.steps or self.log.reached_target
                saves = ends or done % config.checkpoint_interval == 0
                evaluates = saves or done % config.eval_interval == 0
                samples = config.sample_interval and done % config.sample_interval == 0
                if evaluates or samples:
                    waiting = self.log_step(waiting)
                    jax.block_until_ready(state)  # what was dispatched is training time, not evaluation time
                if evaluates:
                    self.evaluate(state, done)
                if samples:
                    self.write_sample(state, done)
                if saves:
                    self.save(state, done)
                if ends:
                    break
            self.log.end()
            if config.steps == 0 and plan.checkpoint is None:
                self.save(state, 0)
        finally:
            self.writer.close()

    def compiled_step(self) -> jax.stages.Compiled:
        with self.log.untimed():
            compiled, seconds = self.training.result()
            check_memory(compiled, self.config, self.definition, self.mesh)
            self.log.say(f"compiled the train step in {seconds:.1f} s")
            return compiled

    def scalar(self, value: float) -> np.ndarray:
        return np.asarray(value, self.definition.execution.param_dtype)

    def put(self, step: int) -> tuple[jax.Array, jax.Array]:
        return put_batch(self.batches[step], self.config.accumulation, self.mesh)

    def log_step(self, waiting) -> None:
        """Fetch and log the metrics of an earlier step."""
        if waiting is not None:
            step, rate, metrics = waiting
            self.log.train(step, loss=float(metrics.loss), learning_rate=rate, grad_norm=float(metrics.grad_norm))

    def evaluate(self, state: TrainState, step: int) -> None:
        if not len(self.tokens.val):
            return
        with self.log.untimed():
            eval_step = self.evaluating.result()
            losses, count = [], 0
            for batch in evaluation_batches(
                self.tokens.val,
                block_size=self.config.model.block_size,
                batch_size=self.config.microbatch_size,
                sequences=self.config.eval_sequences,
            ):
                losses.append(eval_step(state.params, *batch))
                count += int((batch.targets != IGNORED).sum())
            self.log.evaluation(step, math.fsum(map(float, losses)) / count)

    def save(self, state: TrainState, step: int) -> None:
        with self.log.untimed():
            self.writer.save(step, state, metadata_of(self.config, step, "jax", self.tokens.digest))
            self.log.draw_curves()

    def write_sample(self, state: TrainState, step: int) -> None:
        with self.log.untimed():
            tokenizer = get_tokenizer(self.config.data.tokenizer)
            numbers = uniforms(self.config.seed, step, self.config.sample_tokens)[None]
            tokens = self.generator(state.params, [[tokenizer.end_of_text]], numbers, Sampling())
            self.folder.write_sample(step, tokenizer.decode([row[0] for row in tokens]))
