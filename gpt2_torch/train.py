"""The reference trainer, on one device or, under torchrun, on one device a process: DistributedDataParallel, or FSDP2.

Read it from top to bottom: one step, an evaluation, the set-up of a run, and the loop.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2_core.config import IGNORE_INDEX, ResolvedConfig, TrainConfig
from gpt2_core.data.batches import Batch, TrainingBatches, evaluation_batches
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.data.tokens import TokenFolder, open_tokens, with_steps
from gpt2_core.errors import DivergedError, RunError, SaveError, Stopped, UserError
from gpt2_core.evaluation.run import Evaluated, Rows, figures_of, open_tasks
from gpt2_core.runs.due import Due, due_after, due_at_start, is_due_as_best, is_logged
from gpt2_core.runs.folder import SAVE_AGAIN, RunFolder, RunPlan, losses_of, metadata_of, plan_run
from gpt2_core.runs.log import Outcome, RunLog, peak_flops
from gpt2_core.runs.stop import StopRequest, stopped_by_signals
from gpt2_core.runs.watchdog import watching
from gpt2_core.sampling import Sampling, uniforms
from gpt2_core.schedule import learning_rate
from gpt2_core.spikes import known, window
from gpt2_core.weights import Weights
from gpt2_torch import checkpoints, fsdp
from gpt2_torch.divergence import first_not_finite
from gpt2_torch.generate import generate
from gpt2_torch.memory import check_memory, memory_errors
from gpt2_torch.model import GPT2
from gpt2_torch.optimizer import make_optimizer
from gpt2_torch.runtime import (
    device_name,
    pick_device,
    process_group,
    resolve,
    set_deterministic,
    set_matmul_precision,
)
from gpt2_torch.score import scorer
from gpt2_torch.spikes import loss_limit, with_loss
from gpt2_torch.weights import to_state_dict

T = TypeVar("T")

# --- one step


def accumulate_gradients(
    model: nn.Module,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    *,
    accumulation: int = 1,
    autocast: contextlib.AbstractContextManager | None = None,
) -> Tensor:
    """Add the gradients of the mean loss over the targets that count, and return that loss.

    The batch is computed in `accumulation` parts; the mean is over all parts together, and over all processes.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    count = (targets_BT != IGNORE_INDEX).sum()
    if processes > 1:
        dist.all_reduce(count)
    total = torch.zeros((), device=inputs_BT.device, dtype=loss_dtype(model))
    parts = list(zip(inputs_BT.chunk(accumulation), targets_BT.chunk(accumulation), strict=True))
    for number, (inputs, targets) in enumerate(parts, start=1):
        # DDP and FSDP exchange gradients after the last part only, and divide their sum by the number of processes.
        waits = processes > 1 and number < len(parts)
        if fsdp.is_split(model):
            model.set_requires_gradient_sync(not waits)
        with model.no_sync() if waits and not fsdp.is_split(model) else contextlib.nullcontext():
            with autocast or contextlib.nullcontext():
                loss = model(inputs, targets) / count
            (loss * processes).backward()
        total += loss.detach()
    if processes > 1:
        dist.all_reduce(total)
    return total


def dropout_seed(seed: int, step: int, rank: int, processes: int) -> int:
    """PyTorch's seed before each step: dropout is then a function of (seed, step, rank), and no random state needs to
    be saved."""
    return seed * 1_000_003 + step * processes + rank


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    *,
    learning_rate: float,
    clip_norm: float,
    accumulation: int = 1,
    autocast: contextlib.AbstractContextManager | None = None,
    loss_limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One update, left out if the loss or the gradient norm isn't finite, or the loss above its limit. Returns the mean
    loss and the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss = accumulate_gradients(model, inputs_BT, targets_BT, accumulation=accumulation, autocast=autocast)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm if clip_norm > 0 else float("inf"))
    grad_norm = fsdp.whole(norm)
    is_update = torch.isfinite(loss) & torch.isfinite(grad_norm)
    if loss_limit is not None:
        is_update &= loss <= loss_limit
    if optimizer.defaults["fused"]:
        # Decided on the device, so that the host needn't wait.
        optimizer.found_inf = fsdp.on_every_process(1.0 - is_update.float(), norm)
        optimizer.step()
    elif is_update:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, autocast: contextlib.AbstractContextManager
) -> float:
    """Mean loss over the targets of `batches` that count."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        inputs_BT, targets_BT = _to_device(batch, device)
        with autocast:
            total += model(inputs_BT, targets_BT).item()
        count += int((batch.targets != IGNORE_INDEX).sum())
    model.train()
    return total / count


def _to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(part).to(device, torch.long, non_blocking=True) for part in batch)


def loss_dtype(model: nn.Module) -> torch.dtype:
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


# --- a run


def train(asked: TrainConfig, initial: Callable[[TrainConfig], Weights | None] = lambda config: None) -> RunFolder:
    """Train as `asked`; returns the run's folder.

    `initial` reads the weights that a new run starts from; None means random ones.
    Raises Stopped when a signal told the run to stop; it is then saved, if it had begun.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(asked.device)
    config = resolve(asked, device, processes)
    set_matmul_precision(config.precision)
    if config.deterministic:
        set_deterministic()
    with stopped_by_signals() as stop, memory_errors(config, device, processes), process_group(processes, device):
        start = open_run(config, initial, device, rank, processes)
        Trainer(start, stop, device, rank, processes).run()
    return start.plan.folder


class Start(NamedTuple):
    """What a run starts from: its plan, its tokens, the rows of its tasks, and the weights it was given, if any."""

    plan: RunPlan
    tokens: TokenFolder
    tasks: Rows
    weights: Weights | None


def open_run(
    config: ResolvedConfig,
    initial: Callable[[TrainConfig], Weights | None],
    device: torch.device,
    rank: int,
    processes: int,
) -> Start:
    """Open data and weights, once in each process, and take the run's folder if a step fits in the memory.

    The first process goes first, because it may have to write the tokens. It sends its plan to the others, or the
    UserError that all of them then raise.
    """
    start, sent = None, [None]
    if rank == 0:
        try:
            tokens, tasks = open_tokens(config), open_tasks(config)
            # After the tokens: planning a step of a large model takes half a minute, a missing text is known at once.
            check_memory(config, device, processes)
            plan = plan_run(with_steps(config, tokens), framework="torch", data_digest=tokens.digest)
            start = Start(plan, tokens, tasks, initial(plan.config) if plan.checkpoint is None else None)
            plan.begin()
            sent = [dataclasses.replace(plan)]  # without the lock of the folder, which can't be pickled
        except UserError as error:
            sent = [error]
    if processes > 1:
        dist.broadcast_object_list(sent)
    (plan,) = sent
    if isinstance(plan, UserError):
        raise plan
    if start is None:
        tokens, tasks = open_tokens(plan.config), open_tasks(plan.config)
        start = Start(plan, tokens, tasks, initial(plan.config) if plan.checkpoint is None else None)
    return start


class Trainer:
    """One process of a run: everything is set up once, then `run` is the loop."""

    def __init__(self, start: Start, stop: StopRequest, device: torch.device, rank: int, processes: int) -> None:
        self.plan, self.tokens, self.tasks, _ = start
        self.config, self.folder = config, folder = self.plan.config, self.plan.folder
        self.stop, self.device, self.rank, self.processes = stop, device, rank, processes
        self.stop_flag: tuple[Tensor, dist.Work] | None = None
        self.unsaved: Exception | None = None
        """Why the last checkpoint that was due isn't there."""
        self.made = self.saved = self.plan.step
        """Steps made, and those of the last checkpoint."""
        self.unchecked: list[tuple[int, tuple[Tensor, ...]]] = []
        """Steps whose loss, gradient norm and loss limit haven't been read."""

        torch.manual_seed(config.seed)
        self.model = GPT2(config.model).to(dtype=torch.float64 if config.precision == "float64" else torch.float32)
        if self.plan.checkpoint is not None:
            checkpoints.restore_model(self.plan.checkpoint, self.model)
        elif start.weights is not None:
            self.model.load_state_dict(to_state_dict(start.weights))
        if config.fsdp:
            fsdp.split(self.model)  # and moves each part to its device
        else:
            self.model.to(device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        if self.plan.checkpoint is not None:
            checkpoints.restore_optimizer(self.plan.checkpoint, self.optimizer)
        self.losses_W: Tensor | None = None
        if config.skip_spikes is not None:
            before = window(losses_of(self.plan.checkpoint) if self.plan.checkpoint else [])
            self.losses_W = torch.tensor(before, dtype=loss_dtype(self.model), device=device)

        # Evaluation runs the compiled module and training its DDP wrapper. Both share the weights of `model`, which
        # stays the plain module that checkpoints and samples use.
        self.compiled: nn.Module = torch.compile(self.model) if config.compile else self.model
        self.trained = self.compiled
        if processes > 1 and not config.fsdp:
            gpus = [device.index] if device.type == "cuda" else None
            self.trained = DistributedDataParallel(self.compiled, device_ids=gpus)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

        self.batches = TrainingBatches(
            self.tokens.train,
            sequence_length=config.tokens_per_sequence,
            batch_size=config.batch_size,
            seed=config.seed,
            order=config.data.order,
            rows=range(rank, config.batch_size, processes),
        )
        peak = peak_flops(device_name(device), config.precision)
        peak = peak and peak * processes
        self.log = RunLog(folder, config, start_step=self.plan.step, peak_flops=peak, enabled=rank == 0)

    def run(self) -> None:
        config, first, resumed = self.config, self.plan.step, self.plan.checkpoint is not None
        with self.log as log:
            log.introduce(
                f"torch {torch.__version__} on {self.processes} x {device_name(self.device)}, {config.precision}, "
                f"{'compiled' if config.compile else 'eager'}; {config.model.parameter_count:,} parameters; "
                f"{self.tokens.source}; run {self.folder.path}" + (f", from step {first}" if resumed else ""),
                self.plan.warnings,
            )
            with self.stop.deferred(), watching(config.hang_timeout) as self.watchdog:
                try:
                    updates = self.loop(first)
                except DivergedError as error:
                    self.keep_for_study(error.step)
                    raise
        if updates < config.steps and not log.reached_target:
            if self.processes > 1:
                dist.barrier()  # torchrun kills all processes when one has ended, and the first may still be saving
            self.stop.check(f"{updates} steps are saved; continue with --resume")

    def loop(self, first: int) -> int:
        """All steps from `first` on, and what is due between them; returns the number of updates made."""
        config, log, updates = self.config, self.log, first
        self.do(due_at_start(self.plan), first)
        for step in range(first, first if log.reached_target else config.steps):
            if self.told_to_stop():
                break
            self.step(step)
            updates = step + 1
            due = due_after(updates, config, reached_target=log.reached_target)
            self.do(due, updates)
            if due.stop:
                break
        if self.takes_part and self.first_says(self.unsaved or (self.stop and updates not in self.folder.steps())):
            self.save(updates)
        if self.unsaved:
            raise RunError(f"{self.unsaved}: the state after step {updates} is lost; {SAVE_AGAIN}")
        log.end(updates, "gpt2 train-torch")
        return updates

    def keep_for_study(self, step: int) -> None:
        """Save the state as it is, and the batch of the last update that was left out.

        The state is the one before them, unless updates were made since, of steps that weren't logged."""
        if self.takes_part:
            batch = self.batches[step]
            inputs_BT, targets_BT = _to_device(batch, self.device)
            parts = zip(
                inputs_BT.chunk(self.config.accumulation), targets_BT.chunk(self.config.accumulation), strict=True
            )
            with self.autocast:
                module = first_not_finite(self.model, parts)
            if self.rank == 0:
                self.folder.write_diverged(step, self.batches.sequences(step), module, **batch._asdict())
            if self.first_says(self.made not in self.folder.steps()):
                self.save(self.made)

    @property
    def takes_part(self) -> bool:
        """Whether this process does what the first one does for all: a split model computes in all of them."""
        return self.rank == 0 or self.config.fsdp

    def first_says(self, value: object) -> bool:
        """Whether the first process finds `value` true, told to all that take part."""
        if not self.config.fsdp:
            return bool(value)
        said = [bool(value)]
        dist.broadcast_object_list(said)
        return said[0]

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items; raises Stopped between two of them if the run is told to stop, in all processes that take part."""
        for item in items:
            self.check()
            yield item
            self.watchdog.progress()

    def check(self) -> None:
        """Raise Stopped if the run is told to stop, in all processes that take part."""
        if self.config.fsdp:
            self.told_to_stop()
        self.stop.check()

    def told_to_stop(self) -> bool:
        """Whether the run was told to stop, by a signal to any of its processes: the same answer in all of them.

        Of several processes it is the answer to the question asked one step ago, so that none waits for it.
        """
        if self.processes == 1:
            return bool(self.stop)
        before = self.stop_flag
        flag = torch.tensor(float(bool(self.stop)), device=self.device)
        self.stop_flag = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return False
        before[1].wait()
        if told := bool(before[0]):
            self.stop.tell("a signal to another process")
        return told

    def step(self, step: int) -> None:
        """One update, logged where that is due."""
        config = self.config
        torch.manual_seed(dropout_seed(config.seed, step, self.rank, self.processes))
        rate = learning_rate(step, config.steps, config.optimizer)
        limit = None if self.losses_W is None else loss_limit(self.losses_W, config.skip_spikes)
        loss, grad_norm = train_step(
            self.trained,
            self.optimizer,
            *_to_device(self.batches[step], self.device),
            learning_rate=rate,
            clip_norm=config.optimizer.clip_norm,
            accumulation=config.accumulation,
            autocast=self.autocast,
            loss_limit=limit,
        )
        if self.losses_W is not None:
            self.losses_W = with_loss(self.losses_W, loss)
        self.made = step + 1
        self.unchecked.append((step, (loss, grad_norm) if limit is None else (loss, grad_norm, limit)))
        self.watchdog.progress()
        if is_logged(step, config):
            outcomes = [(number, Outcome(*(value.item() for value in values))) for number, values in self.unchecked]
            self.unchecked = []
            self.log.check_updates(outcomes)
            self.log.train(step, outcomes[-1][1], learning_rate=rate)

    def do(self, due: Due, updates: int) -> None:
        """What is due after so many updates; the first process does it for all, if the model isn't split."""
        self.watchdog.progress()
        if not self.takes_part:
            return
        with self.log.untimed():
            with contextlib.suppress(Stopped):  # given up; due_at_start makes up for it
                if due.evaluate:
                    self.evaluate(updates)
                if due.sample:
                    self.write_sample(updates)
            is_best = is_due_as_best(updates, self.saved, self.log.is_best(updates), self.config)
            if due.save or self.first_says(is_best):
                self.save(updates)

    def evaluate(self, updates: int) -> None:
        if not len(self.tokens.val):
            return
        validation = evaluation_batches(
            self.tokens.val,
            sequence_length=self.config.tokens_per_sequence,
            batch_size=self.config.microbatch_size // self.processes,
            sequences=self.config.eval_sequences,
        )
        batches = self.checked(validation)
        loss = evaluate(self.compiled, batches, self.device, self.autocast)
        self.log.evaluation(updates, loss, self.task_figures())

    def task_figures(self) -> dict[str, float]:
        # The plain module: the compiled one would be compiled again for each length.
        model = Evaluated(
            self.config.model,
            get_tokenizer(self.config.data.tokenizer),
            scorer(self.model.eval(), self.device, self.autocast),
            max(1, self.config.microbatch_size // self.processes),
        )
        figures = figures_of(model, self.tasks, self.check)
        self.model.train()
        return figures

    def write_sample(self, updates: int) -> None:
        tokenizer = get_tokenizer(self.config.data.tokenizer)
        numbers = uniforms(self.config.seed, updates, self.config.sample_tokens)[None]
        with self.autocast:
            tokens = generate(self.model, [[tokenizer.end_of_text]], numbers, Sampling())
            ids = [row[0] for row in self.checked(tokens)]
        self.model.train()
        if self.rank == 0:
            with self.log.going_on(self.folder.sample(updates)):
                self.folder.write_sample(updates, tokenizer.decode(ids))

    def save(self, updates: int) -> None:
        self.unsaved, self.saved = None, updates
        state, optimizer_state = self.model.state_dict(), self.optimizer.state_dict()
        if self.config.fsdp:
            state, optimizer_state = (fsdp.gathered(tree, keep=self.rank == 0) for tree in (state, optimizer_state))
        if self.rank > 0:
            return
        if not checkpoints.is_finite(state, optimizer_state):
            self.log.refuse_state(updates)
        losses = None if self.losses_W is None else known(self.losses_W.tolist())
        metadata = metadata_of(self.config, updates, "torch", self.tokens.digest, self.log.figures, losses)
        try:
            checkpoints.save(self.folder.checkpoints / str(updates), state, metadata, optimizer_state)
            self.folder.remove_obsolete(self.config.keep_checkpoints)
        except (SaveError, OSError) as error:
            self.unsaved = error
            self.log.say(f"warning: {error}; training goes on, and the next checkpoint is saved when it is due")
        self.log.update_curves()
