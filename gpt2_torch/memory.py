"""The memory that a train step needs, measured with fake tensors, which have shapes and no values."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt2_core.config import ResolvedConfig
from gpt2_core.errors import UserError
from gpt2_core.memory import check_state, host_memory, out_of_memory
from gpt2_torch.model import GPT2
from gpt2_torch.optimizer import make_optimizer


@contextlib.contextmanager
def memory_errors(config: ResolvedConfig, device: torch.device, processes: int) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into a UserError with a suggested batch size."""
    try:
        yield
    except RuntimeError as error:
        # Each device's allocator has its own message.
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        raise _out_of_memory(config, device, processes) from error


def check_memory(config: ResolvedConfig, device: torch.device, processes: int) -> None:
    """Raise UserError if the step is sure to fail: on CPU the system would kill the process, without an error."""
    check_state(config, num_shards=processes if config.fsdp else 1, available=_available(device), device=device.type)
    if device.type == "cpu":
        sequences = config.microbatch_size // processes
        if bytes_needed(config, "cpu", sequences, config.accumulation, processes) > host_memory():
            raise _out_of_memory(config, device, processes)


def _out_of_memory(config: ResolvedConfig, device: torch.device, processes: int) -> UserError:
    def planner(sequences: int, accumulation: int) -> int:
        return bytes_needed(config, device.type, sequences, accumulation, processes)

    return out_of_memory(config, planner, num_shards=processes, available=_available(device), device=device.type)


def _available(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory()


def bytes_needed(config: ResolvedConfig, device: str, sequences: int, accumulation: int, processes: int = 1) -> int:
    """Largest number of bytes in tensors during a step of so many sequences at once, uncompiled; compiled, a model
    keeps less for its backward pass."""
    from torch.distributed._tools.mem_tracker import MemTracker  # here: importing it takes two seconds

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if config.precision == "float64" else torch.float32)
    try:
        with FakeTensorMode(), torch.device(device):
            model = GPT2(config.model)
            optimizer = make_optimizer(model, config.optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes the moments
            optimizer.zero_grad(set_to_none=True)
            tokens_BT = torch.zeros((sequences, config.tokens_per_sequence), dtype=torch.long)
            tracker = MemTracker()
            tracker.track_external(model, optimizer, tokens_BT)
            with tracker:
                for part in range(min(accumulation, 2)):  # from the second on, gradients are there from the start
                    if part:
                        tracker.reset_mod_stats()
                    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
                        loss = model(tokens_BT, tokens_BT)
                    loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            parameters = sum(p.numel() * p.element_size() for p in model.parameters())
            block = sum(p.numel() * p.element_size() for p in model.h[0].parameters())
    finally:
        torch.set_default_dtype(default)
    peak = max(found["Total"] for found in tracker.get_tracker_snapshot("peak").values())
    if config.fsdp:
        # Parameters, moments and gradients are split; two blocks are gathered at a time, the head's with them.
        head = model.wte.weight.numel() * model.wte.weight.element_size()
        return peak - 4 * parameters * (processes - 1) // processes + 2 * (block + head)
    # DistributedDataParallel has a second copy of the gradients, in its buckets.
    return peak + (parameters if processes > 1 else 0)
