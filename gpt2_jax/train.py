"""The JAX trainer: a mesh of devices, of one process or several, and one compiled step."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_core.config import IGNORE_INDEX, ResolvedConfig, TrainConfig, resolved, with_accumulation
from gpt2_core.config.io import from_yaml_text, to_yaml
from gpt2_core.data.batches import TrainingBatches, evaluation_batches
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.data.tokens import TokenFolder, open_tokens, with_steps
from gpt2_core.errors import DivergedError, RunError, SaveError, Stopped, UserError
from gpt2_core.evaluation.run import Evaluated, Rows, figures_of, open_tasks
from gpt2_core.runs.due import Due, due_after, due_at_start, is_due_as_best, is_logged
from gpt2_core.runs.folder import SAVE_AGAIN, Logged, RunFolder, RunPlan, logged, metadata_of, plan_run
from gpt2_core.runs.log import Outcome, RunLog, peak_flops
from gpt2_core.runs.stop import StopRequest, stopped_by_signals
from gpt2_core.runs.watchdog import Watchdog, watching
from gpt2_core.sampling import Sampling, uniforms
from gpt2_core.schedule import learning_rate
from gpt2_core.spikes import known
from gpt2_core.weights import Weights
from gpt2_jax.attention import choose_kernel
from gpt2_jax.checkpoints import CheckpointWriter, restore
from gpt2_jax.distributed import ALONE, Processes, check_shared
from gpt2_jax.divergence import first_not_finite
from gpt2_jax.generate import Generator
from gpt2_jax.memory import check_memory, check_state_fits, memory_errors
from gpt2_jax.mesh import check_mesh, format_mesh
from gpt2_jax.norm_kernels import choose_norm_kernel
from gpt2_jax.runtime import resolve_mesh, resolve_precision
from gpt2_jax.score import scorer
from gpt2_jax.train_step import Metrics, Program, TrainState, make_program
from gpt2_jax.weights import from_canonical


def resolve(config: TrainConfig) -> ResolvedConfig:
    """Fill in what `auto` and left-out options mean on this machine; raises UserError for what it can't do."""
    precision = resolve_precision(config.precision)
    sizes = resolve_mesh(config)
    config = with_accumulation(config, sizes["data"] * sizes["fsdp"])
    check_mesh(sizes, config)
    model = config.model
    kernel = choose_kernel(config.attention, precision=precision, model=model)
    norm_kernel = choose_norm_kernel(config.norm_kernel, precision=precision, norm=model.norm)
    return resolved(config, precision=precision, mesh=format_mesh(sizes), attention=kernel, norm_kernel=norm_kernel)


def train(
    asked: TrainConfig,
    initial: Callable[[TrainConfig], Weights | None] = lambda config: None,
    processes: Processes = ALONE,
) -> RunFolder:
    """Train as `asked`; returns the run's folder.

    `initial` reads the weights that a new run starts from; None means random ones. `processes` are those of the run,
    which all call this with the same arguments.
    `gpt2_jax.runtime.configure` must have been called for this precision and mesh.
    Raises Stopped when a signal told the run to stop; it is then saved, if it had begun.
    """
    with stopped_by_signals(processes.stop_request()) as stop:
        return _train(asked, initial, processes, stop)


def open_run(
    config: ResolvedConfig, initial: Callable[[TrainConfig], Weights | None], processes: Processes
) -> tuple[RunPlan, TokenFolder, Rows, Weights | None]:
    """The plan of the run, whose folder the first process takes; tokens, the rows of its tasks and weights, opened in
    each process.

    The first goes first, because it may have to write the tokens, and tells the others its plan.
    """

    def begin() -> dict[str, Any]:
        plan.begin()
        checkpoint = plan.checkpoint and str(plan.checkpoint)
        return {"config": to_yaml(plan.config), "checkpoint": checkpoint, "continued": plan.continued}

    if processes.is_first:
        tokens, tasks = open_tokens(config), open_tasks(config)
        plan = plan_run(with_steps(config, tokens), framework="jax", data_digest=tokens.digest)
        check_state_fits(plan.config, processes.on_this_host)
        weights = initial(plan.config) if plan.checkpoint is None else None
    told = processes.from_first(begin)
    if not processes.is_first:
        config = resolved(from_yaml_text(told["config"]))
        checkpoint = told["checkpoint"] and Path(told["checkpoint"])
        plan = RunPlan(config, RunFolder(Path(config.run_dir)), checkpoint, told["continued"])
    check_shared(plan.folder.path, processes)
    if not processes.is_first:
        tokens, tasks = open_tokens(config), open_tasks(config)
        weights = initial(config) if checkpoint is None else None
    if tokens.digest != processes.from_first(lambda: tokens.digest):
        raise UserError(
            f"process {processes.index} reads other tokens than process 0 ({tokens.path}); give all hosts the same "
            "text, or a --data.cache_dir that they share"
        )
    return plan, tokens, tasks, weights


def _train(
    asked: TrainConfig,
    initial: Callable[[TrainConfig], Weights | None],
    processes: Processes,
    stop: StopRequest,
) -> RunFolder:
    plan, tokens, tasks, weights = open_run(resolve(asked), initial, processes)
    config, folder, program = plan.config, plan.folder, make_program(plan.config)
    device, devices = jax.devices()[0].device_kind, program.mesh.size
    together = f" of {processes.count} processes" if processes.count > 1 else ""
    peak = peak_flops(device, config.precision)
    log = RunLog(
        folder,
        config,
        start_step=plan.step,
        peak_flops=peak and peak * devices,
        enabled=processes.is_first,
        before=Logged(*processes.from_first(lambda: logged(folder.metrics))),
    )
    with memory_errors(program, processes.on_this_host), jax.set_mesh(program.mesh), _compiler() as compiler:
        train_step_future = compiler.submit(_compile, program) if plan.step < config.steps else None
        eval_step_future = compiler.submit(program.compile_eval_step)
        if plan.checkpoint is not None:
            state = restore(plan.checkpoint, program.abstract_state)
        else:
            state = new_state(program, weights)
        with log:
            log.introduce(
                f"jax {jax.__version__} on {devices} x {device} ({config.mesh}){together}, {config.precision}, "
                f"{config.attention} attention, {config.norm_kernel} layer norm; {config.model.parameter_count:,} "
                f"parameters; {tokens.source}; run "
                f"{folder.path}" + (f", from step {plan.step}" if plan.checkpoint else ""),
                plan.warnings,
            )
            with processes.closing(), stop.deferred(), watching(config.hang_timeout) as watchdog:
                futures = train_step_future, eval_step_future
                loop = _Loop(program, tokens, tasks, folder, log, processes, stop, watchdog, *futures)
                loop.run(state, plan)
    return folder


@contextlib.contextmanager
def _compiler() -> Iterator[ThreadPoolExecutor]:
    """Threads to compile in. Leaving them doesn't wait: a run that was told to stop ends at once."""
    compiler = ThreadPoolExecutor(2)
    try:
        yield compiler
    finally:
        compiler.shutdown(wait=False, cancel_futures=True)


def _compile(program: Program) -> tuple[jax.stages.Compiled, float]:
    """The compiled train step, and the seconds that compiling took."""
    begin = time.perf_counter()
    return program.compile_train_step(), time.perf_counter() - begin


def new_state(program: Program, initial: Weights | None) -> TrainState:
    """The state before the first step, of these weights or of random ones."""
    params = None if initial is None else from_canonical(initial, program.definition.execution.param_dtype.name)
    return program.initial_state(params)


class _Loop:
    """The training loop. The host doesn't wait for the device: while that computes a step, the host prepares the next
    batch and logs the step before."""

    def __init__(
        self,
        program: Program,
        tokens: TokenFolder,
        tasks: Rows,
        folder: RunFolder,
        log: RunLog,
        processes: Processes,
        stop: StopRequest,
        watchdog: Watchdog,
        train_step_future: Future[tuple[jax.stages.Compiled, float]] | None,
        eval_step_future: Future[jax.stages.Compiled],
    ) -> None:
        self.program, self.config, self.tokens, self.folder = program, program.config, tokens, folder
        self.tasks, self.log, self.processes, self.stop, self.watchdog = tasks, log, processes, stop, watchdog
        self.unchecked: list[tuple[int, Metrics]] = []
        """Steps whose loss and gradient norm haven't been fetched."""
        self.unsaved: SaveError | None = None
        """Why the last checkpoint that was due isn't there."""
        self.saved = 0
        """The step of the last checkpoint."""
        self.train_step_future, self.eval_step_future = train_step_future, eval_step_future
        self.generator = Generator(program.definition)
        self.writer = CheckpointWriter(folder, self.config.keep_checkpoints, processes)
        self.batches = self.read(program.rows)

    def read(self, rows: Sequence[int] | None) -> TrainingBatches:
        """The training batches, or these rows of them."""
        return TrainingBatches(
            self.tokens.train,
            sequence_length=self.config.tokens_per_sequence,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            order=self.config.data.order,
            rows=rows,
        )

    def run(self, state: TrainState, plan: RunPlan) -> None:
        config, first, log, stop = self.config, plan.step, self.log, self.stop
        updates, pending, self.saved = first, None, first
        try:
            if first < config.steps:
                train_step = self.compiled_step()
            self.do(Due(*self.processes.from_first(lambda: due_at_start(plan))), state, first)
            if first < config.steps:
                batch = self.put(first)
            for step in range(first, first if log.reached_target else config.steps):
                if stop:
                    break
                rate = learning_rate(step, config.steps, config.optimizer)
                state, metrics = train_step(state, *batch, self.scalar(rate))
                self.unchecked.append((step, metrics))
                updates = step + 1
                self.watchdog.progress()
                if updates < config.steps:
                    batch = self.put(updates)
                pending = self.log_metrics(pending)
                if self.writer.has_failed:
                    self.wait_for_save()
                if is_logged(step, config):
                    pending = (step, rate)
                    if config.target_loss is not None or config.best_checkpoint_interval:
                        pending = self.log_metrics(pending)  # this loss may reach the target, or be the best
                due = due_after(updates, config, reached_target=log.reached_target)
                if due.evaluate or due.sample:
                    pending = self.log_metrics(pending)
                    jax.block_until_ready(state)  # steps that were dispatched are training time, not evaluation time
                self.do(due, state, updates)
                if due.stop:
                    break
            if stop:
                self.log_metrics(pending)
                self.save_unless_saved(state, updates)
            self.end_saving(state, updates)
            log.end(updates, "gpt2 train")
        except DivergedError as error:
            # The state is the one before the updates that were left out, unless some were made since.
            module = first_not_finite(self.program, state.params, self.batches[error.step])
            if self.processes.is_first:
                whole = self.read(None)
                batch = whole[error.step]
                self.folder.write_diverged(error.step, whole.sequences(error.step), module, **batch._asdict())
            self.save_unless_saved(state, updates)
            raise
        finally:
            with self.warning_of_saves():
                self.writer.close()
        if updates < config.steps and not log.reached_target:
            stop.check(f"{updates} steps are saved; continue with --resume")

    def compiled_step(self) -> jax.stages.Compiled:
        with self.log.untimed():
            compiled, seconds = self.stop.result(self.train_step_future)
            check_memory(compiled, self.program, self.processes.on_this_host)
            self.log.say(f"compiled the train step in {seconds:.1f} s")
            return compiled

    def scalar(self, value: float) -> np.ndarray:
        return np.asarray(value, self.program.definition.execution.param_dtype)

    def put(self, step: int) -> tuple[jax.Array, jax.Array]:
        return self.program.put_batch(self.batches[step])

    def log_metrics(self, pending: tuple[int, float] | None) -> None:
        """Fetch and log the metrics of an earlier step, if any are pending; afterwards none are."""
        if pending is None:
            return
        step, rate = pending
        fetched = [one for one in self.unchecked if one[0] <= step]
        self.unchecked = self.unchecked[len(fetched) :]
        outcomes = [(number, Outcome(*map(float, jax.tree.leaves(m)))) for number, m in jax.device_get(fetched)]
        self.log.check_updates(outcomes)
        self.log.train(step, outcomes[-1][1], learning_rate=rate)

    def do(self, due: Due, state: TrainState, updates: int) -> None:
        """What is due after so many updates."""
        self.watchdog.progress()
        with self.log.untimed():
            with contextlib.suppress(Stopped):  # given up; due_at_start makes up for it
                if due.evaluate:
                    self.evaluate(state, updates)
                if due.sample:
                    self.write_sample(state, updates)
            if due.save or is_due_as_best(updates, self.saved, self.log.is_best(updates), self.config):
                self.save(state, updates)

    def evaluate(self, state: TrainState, updates: int) -> None:
        if not len(self.tokens.val):
            return
        eval_step = self.stop.result(self.eval_step_future)
        losses, count = [], 0
        batches = evaluation_batches(
            self.tokens.val,
            sequence_length=self.config.tokens_per_sequence,
            batch_size=self.config.microbatch_size,
            sequences=self.config.eval_sequences,
        )
        for batch in self.stop.checked(batches):
            losses.append(eval_step(state.params, *self.program.put_evaluation(batch)))
            self.watchdog.progress()
            count += int((batch.targets != IGNORE_INDEX).sum())
        loss = math.fsum(map(float, losses)) / count
        model = Evaluated(
            self.config.model,
            get_tokenizer(self.config.data.tokenizer),
            scorer(self.program, state.params),
            self.config.microbatch_size,
        )
        self.log.evaluation(updates, loss, figures_of(model, self.tasks, self.stop.check))

    def write_sample(self, state: TrainState, updates: int) -> None:
        tokenizer = get_tokenizer(self.config.data.tokenizer)
        numbers = uniforms(self.config.seed, updates, self.config.sample_tokens)[None]
        tokens = self.generator(state.params, [[tokenizer.end_of_text]], numbers, Sampling())
        text = tokenizer.decode([row[0] for row in self.stop.checked(tokens)])
        if self.processes.is_first:
            with self.log.going_on(self.folder.sample(updates)):
                self.folder.write_sample(updates, text)

    def save_unless_saved(self, state: TrainState, updates: int) -> None:
        self.wait_for_save()
        if self.processes.from_first(lambda: updates not in self.folder.steps()):
            self.save(state, updates)

    def save(self, state: TrainState, updates: int) -> None:
        if not self.program.is_finite(state):
            self.log.refuse_state(updates)
        self.wait_for_save()
        self.unsaved, self.saved = None, updates
        with self.warning_of_saves():
            losses = None if state.losses is None else known(np.asarray(state.losses).tolist())
            metadata = metadata_of(self.config, updates, "jax", self.tokens.digest, self.log.figures, losses)
            self.writer.save(updates, state, metadata)
        self.log.update_curves()

    def wait_for_save(self) -> None:
        with self.warning_of_saves():
            self.writer.wait()

    def end_saving(self, state: TrainState, updates: int) -> None:
        """Wait for the last save, and try it once more if it failed; raises RunError if it fails again."""
        self.wait_for_save()
        if self.unsaved:
            self.save(state, updates)
            self.wait_for_save()
        if self.unsaved:
            raise RunError(f"{self.unsaved}: the state after step {updates} is lost; {SAVE_AGAIN}")

    @contextlib.contextmanager
    def warning_of_saves(self) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            self.unsaved = error
            self.log.say(f"warning: {error}; training goes on, and the next checkpoint is saved when it is due")
