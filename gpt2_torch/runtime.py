"""The device, the precision and the processes that a PyTorch run gets on this machine."""

import contextlib
import gc
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from gpt2_core.config import ResolvedConfig, TrainConfig, resolved, with_accumulation
from gpt2_core.errors import UserError


def resolve(config: TrainConfig, device: torch.device, processes: int) -> ResolvedConfig:
    """Fill in what `auto` and left-out options mean on this device; raises UserError for what it can't do."""
    precision = resolve_precision(config.precision, device)
    config = with_accumulation(config, processes)
    if config.microbatch_size % processes:
        raise UserError(
            f"--batch_size {config.batch_size}: not divisible by accumulation {config.accumulation} x "
            f"{processes} processes"
        )
    if config.fsdp and processes == 1:
        raise UserError("--fsdp true: splits a model over processes, and there is one; start several with torchrun")
    compiled = device.type == "cuda" if config.compile is None else config.compile
    return resolved(config, precision=precision, compile=compiled)


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


def device_name(device: torch.device) -> str:
    """What the driver calls a GPU, or the kind of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resolve_precision(precision: str, device: torch.device) -> str:
    """What `auto` means on this device; raises UserError for a precision that it doesn't have."""
    if precision == "float64" and device.type == "mps":
        raise UserError("--precision float64: mps has no float64; use --device cpu")
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(
            "--precision tf32: needs an NVIDIA GPU of compute capability 8.0 or newer (Ampere), and this is "
            f"{device_name(device)}; use float32"
        )
    if precision == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    return precision


def set_matmul_precision(precision: str) -> None:
    """Compute this process's float32 matrix products in TF32 for tf32, and in full float32 for any other precision.

    Set by this function and not by torch.backends.cuda.matmul.fp32_precision: torch.compile reads this setting, and
    PyTorch raises an error if a process uses both.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def set_deterministic() -> None:
    """Have this process use kernels that compute the same bits in every run, before its first use of a device; what has
    none raises an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS wants for it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def process_group(processes: int, device: torch.device) -> Iterator[None]:
    """The process group of a run by several processes; all of them leave it together."""
    if processes == 1:
        yield
        return
    # Imported before there is a group: if DDP imported it later, default arguments in it would hold the group for ever.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except UserError:  # every process raises it
        dist.destroy_process_group()
        raise
    # Gloo's threads may still hold tensors and free them later, which crashes a Python that is shutting down. The group
    # joins its threads once nothing refers to it, which includes reference cycles of DDP.
    gc.collect()
    dist.destroy_process_group()
