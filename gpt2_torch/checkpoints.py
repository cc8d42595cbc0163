"""A checkpoint of the PyTorch trainer: model.safetensors (the state dict), optimizer.pt, metadata."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2_core.errors import SaveError, UserError, reason
from gpt2_core.files import publish
from gpt2_core.runs.folder import metadata_path
from gpt2_core.runs.manifest import write_manifest
from gpt2_torch.fsdp import split_like


def save(
    checkpoint: Path,
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    optimizer_state: dict[str, Any],
) -> None:
    """Write the folder `checkpoint`, whole or not at all; replaces one of the same step. Raises SaveError."""
    temporary = checkpoint.with_name(f".{checkpoint.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        checkpoint.parent.mkdir(exist_ok=True)  # and not its parent: a run's folder that was removed stays so
        metadata_path(temporary).parent.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / "model.safetensors")
        torch.save(optimizer_state, temporary / "optimizer.pt")
        metadata_path(temporary).write_text(json.dumps(metadata))
        write_manifest(temporary)
        shutil.rmtree(checkpoint, ignore_errors=True)
        publish(temporary, checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:  # what torch.save and safetensors make of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"checkpoint {checkpoint.name} can't be saved ({reason(error)})") from error


def is_finite(state: dict[str, Tensor], optimizer_state: dict[str, Any]) -> bool:
    """Whether every number of a training's state is finite."""
    moments = (tensor for values in optimizer_state["state"].values() for tensor in values.values())
    return all(bool(torch.isfinite(tensor).all()) for tensor in (*state.values(), *moments))


def restore_model(checkpoint: Path, model: torch.nn.Module) -> None:
    """Load a checkpoint's parameters into a model that isn't split."""
    with _read_errors(checkpoint):
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's moments into the optimizer of a model, which may be split."""
    with _read_errors(checkpoint):
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(split_like(state, optimizer))


@contextlib.contextmanager
def _read_errors(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged one can raise any type
        raise UserError(f"{checkpoint}: can't be restored ({reason(error)})") from error
