"""The reference trainer, on one device or, under torchrun, on one device a process (DistributedDataParallel).

Reads as a document: one step, an evaluation, and the loop around them.
"""

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2_core.batches import IGNORED, Batch, TrainingBatches, evaluation_batches
from gpt2_core.config import TrainConfig, accumulate
from gpt2_core.errors import UserError
from gpt2_core.interrupt import interruptible
from gpt2_core.run_folder import RunFolder, RunPlan, metadata_of, plan_run
from gpt2_core.runlog import RunLog, peak_flops
from gpt2_core.sampling import Sampling, uniforms
from gpt2_core.schedule import learning_rate
from gpt2_core.tokenizer import get_tokenizer
from gpt2_core.tokens import open_tokens, steps_of
from gpt2_core.weights import Weights
from gpt2_torch import checkpoints
from gpt2_torch.generate import generate
from gpt2_torch.memory import check_memory, memory_errors
from gpt2_torch.model import GPT2
from gpt2_torch.optimizer import make_optimizer
from gpt2_torch.weights import to_state_dict


def accumulate_gradients(
    model: nn.Module,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    *,
    accumulation: int = 1,
    autocast: contextlib.AbstractContextManager | None = None,
) -> Tensor:
    """Add the gradients of the mean loss over the targets that count, and return that loss.

    The batch is computed in `accumulation` parts; the mean is over all of them together, and over all processes.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    count = (targets_BT != IGNORED).sum()
    if processes > 1:
        dist.all_reduce(count)
    total = torch.zeros((), device=inputs_BT.device, dtype=torch.float64 if _is_float64(model) else torch.float32)
    parts = list(zip(inputs_BT.chunk(accumulation), targets_BT.chunk(accumulation), strict=True))
    for number, (inputs, targets) in enumerate(parts, start=1):
        # DDP exchanges gradients after the last part only, and divides their sum by the number of processes.
        waits = processes > 1 and number < len(parts)
        with model.no_sync() if waits else contextlib.nullcontext():
            with autocast or contextlib.nullcontext():
                loss = model(inputs, targets) / count
            (loss * processes).backward()
        total += loss.detach()
    if processes > 1:
        dist.all_reduce(total)
    return total


def dropout_seed(seed: int, step: int, rank: int, processes: int) -> int:
    """What PyTorch is seeded with before each step: dropout is then a function of (seed, step, rank), and nothing
    random need be saved."""
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
) -> tuple[Tensor, Tensor]:
    """One update. Returns the mean loss and the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss = accumulate_gradients(model, inputs_BT, targets_BT, accumulation=accumulation, autocast=autocast)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm if clip_norm > 0 else float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


@torch.no_grad()
def evaluate(model: nn.Module, batches, device: torch.device, autocast: contextlib.AbstractContextManager) -> float:
    """Mean loss over the targets of `batches` that count."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        inputs_BT, targets_BT = _to_device(batch, device)
        with autocast:
            total += model(inputs_BT, targets_BT).item()
        count += int((batch.targets != IGNORED).sum())
    model.train()
    return total / count


def train(config: TrainConfig, initial: Callable[[TrainConfig], Weights | None] = lambda config: None) -> RunFolder:
    """Train as `config` says; returns the run's folder.

    `initial` reads the weights that a run starts from, where it isn't resumed; None means random ones.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    config = resolve(config, device, processes)
    check_memory(config, device, processes)
    set_matmul_precision(config.precision)
    with memory_errors(config, device, processes), _group_of(processes, device):
        return _train(config, initial, device, rank, processes)


def _train(
    config: TrainConfig,
    initial: Callable[[TrainConfig], Weights | None],
    device: torch.device,
    rank: int,
    processes: int,
) -> RunFolder:
    plan = _plan(config, initial, rank, processes)
    config, folder, tokens = plan.config, plan.folder, open_tokens(config)

    torch.manual_seed(config.seed)
    model = GPT2(config.model).to(device, torch.float64 if config.precision == "float64" else torch.float32)
    optimizer = make_optimizer(model, config.optimizer)
    if plan.checkpoint is not None:
        checkpoints.restore(plan.checkpoint, model, optimizer)
    elif (weights := initial(config)) is not None:
        model.load_state_dict(to_state_dict(weights))

    # What computes may be compiled, what trains may be wrapped too; `model` stays the plain module, whose weights
    # they share.
    compiled: nn.Module = torch.compile(model) if config.compile else model
    trained = compiled
    if processes > 1:
        trained = DistributedDataParallel(compiled, device_ids=[device.index] if device.type == "cuda" else None)
    bfloat16 = config.precision == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

    batches = TrainingBatches(
        tokens.train,
        block_size=config.model.block_size,
        batch_size=config.batch_size,
        seed=config.seed,
        process=rank,
        processes=processes,
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name, config.precision)
    log = RunLog(folder, config, start_step=plan.step, peak_flops=peak and peak * processes, enabled=rank == 0)

    def evaluate_and_log(step: int) -> None:
        if rank == 0 and len(tokens.val):
            with log.untimed():
                validation = evaluation_batches(
                    tokens.val,
                    block_size=config.model.block_size,
                    batch_size=config.microbatch_size // processes,
                    sequences=config.eval_sequences,
                )
                log.evaluation(step, evaluate(compiled, validation, device, autocast))

    def save(step: int) -> None:
        if rank == 0:
            with log.untimed():
                metadata = metadata_of(config, step, "torch", tokens.digest)
                checkpoints.save(folder.checkpoints / str(step), model.state_dict(), metadata, optimizer)
                folder.remove_obsolete(config.keep_checkpoints)
                log.draw_curves()

    def write_text(step: int) -> None:
        if rank == 0:
            with log.untimed(), autocast:
                tokenizer = get_tokenizer(config.data.tokenizer)
                numbers = uniforms(config.seed, step, config.sample_tokens)[None]
                ids = [row[0] for row in generate(model, [[tokenizer.end_of_text]], numbers, Sampling())]
                folder.write_sample(step, tokenizer.decode(ids))
                model.train()

    with log:
        log.introduce(
            f"torch {torch.__version__} on {processes} x {name}, {config.precision}, "
            f"{'compiled' if config.compile else 'eager'}; {config.model.parameter_count:,} parameters; "
            f"{tokens.source}; run {folder.path}" + (f", from step {plan.step}" if plan.checkpoint else "")
        )
        if plan.checkpoint is None:
            evaluate_and_log(0)
        for step in interruptible(range(plan.step, plan.step if log.reached_target else config.steps)):
            torch.manual_seed(dropout_seed(config.seed, step, rank, processes))
            rate = learning_rate(step, config.steps, config.optimizer)
            loss, grad_norm = train_step(
                trained,
                optimizer,
                *_to_device(batches[step], device),
                learning_rate=rate,
                clip_norm=config.optimizer.clip_norm,
                accumulation=config.accumulation,
                autocast=autocast,
            )
            if step % config.log_interval == 0 or step + 1 == config.steps:
                log.train(step, loss=loss.item(), learning_rate=rate, grad_norm=grad_norm.item())
            done = step + 1
            ends = done == config.steps or log.reached_target
            due = ends or done % config.checkpoint_interval == 0
            if due or done % config.eval_interval == 0:
                evaluate_and_log(done)
            if config.sample_interval and done % config.sample_interval == 0:
                write_text(done)
            if due:
                save(done)
            if ends:
                break
        log.end()
        if config.steps == 0 and plan.checkpoint is None:
            save(0)
    return folder


@contextlib.contextmanager
def _group_of(processes: int, device: torch.device) -> Iterator[None]:
    """The process group of a run by several processes, which leave it together."""
    if processes == 1:
        yield
        return
    # Imported once there is a group, as DDP would, its functions' defaults refer to the group for ever.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except UserError:  # which all of them raise
        dist.destroy_process_group()
        raise
    # Gloo's threads may still hold tensors, and let go of them whenever they get to it: fatal in a Python that is
    # ending. The group waits for its threads when nothing refers to it any more, DDP's cycles included.
    gc.collect()
    dist.destroy_process_group()


def pick_device(choice: str) -> torch.device:
    """The device that `--device` names; under torchrun, this process's own GPU."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if choice == "auto":
        choice = next(kind for kind, there in found.items() if there)
    if not found[choice]:
        raise UserError(
            f"--device {choice}: PyTorch {torch.__version__} finds none here; "
            f"use {' or '.join(kind for kind, there in found.items() if there)}"
        )
    if choice == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun --nproc_per_node: process {local_rank} finds no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device(choice)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What `auto` means on this device; raises UserError for a precision that it doesn't have."""
    if precision == "float64" and device.type == "mps":
        raise UserError("--precision float64: mps has no float64; use --device cpu")
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            f"--precision tf32: needs an NVIDIA GPU of compute capability 8.0 or newer (Ampere), and this is {name}; "
            f"use float32"
        )
    if precision == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    return precision


def set_matmul_precision(precision: str) -> None:
    """Have this process do float32 matrix products in TF32 for tf32, and in true float32 otherwise.

    By this function, and not torch.backends.cuda.matmul.fp32_precision: torch.compile asks for what it sets, and torch
    raises an error if the two ways are mixed.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def resolve(config: TrainConfig, device: torch.device, processes: int) -> TrainConfig:
    """Fill in what `auto` and left-out options mean on this device; raises UserError for what it can't do."""
    precision = resolve_precision(config.precision, device)
    config = accumulate(config, processes)
    if config.microbatch_size % processes:
        raise UserError(
            f"--batch_size {config.batch_size}: not divisible by accumulation {config.accumulation} x "
            f"{processes} processes"
        )
    compiled = device.type == "cuda" if config.compile is None else config.compile
    return dataclasses.replace(config, precision=precision, compile=compiled)


def _plan(config: TrainConfig, initial: Callable[[TrainConfig], Weights | None], rank: int, processes: int) -> RunPlan:
    """The run, begun by the first process, which finds and tells the others whatever is wrong with it."""
    outcome: list = [None]
    if rank == 0:
        try:
            tokens = open_tokens(config)
            plan = plan_run(steps_of(config, tokens), framework="torch", data_digest=tokens.digest)
            if plan.checkpoint is None:
                initial(plan.config)
            plan.begin()
            outcome = [dataclasses.replace(plan)]
        except UserError as error:
            outcome = [error]
    if processes > 1:
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return plan if rank == 0 else outcome[0]


def _to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(part).to(device, torch.long, non_blocking=True) for part in batch)


def _is_float64(model: nn.Module) -> bool:
    return next(model.parameters()).dtype == torch.float64
