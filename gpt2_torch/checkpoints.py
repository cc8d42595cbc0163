"""A checkpoint of the PyTorch trainer: model.safetensors (the state dict), optimizer.pt, metadata."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2_core.errors import SaveError, UserError
from gpt2_core.files import publish
from gpt2_core.runs.folder import metadata_path
from gpt2_core.runs.manifest import write_manifest


def save(
    checkpoint: Path,
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the folder `checkpoint`, whole or not at all; replaces one of the same step. Raises SaveError."""
    temporary = checkpoint.with_name(f".{checkpoint.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        checkpoint.parent.mkdir(exist_ok=True)  # and not its parent: a run's folder that was removed stays so
        metadata_path(temporary).parent.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / "model.safetensors")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        metadata_path(temporary).write_text(json.dumps(metadata))
        write_manifest(temporary)
        shutil.rmtree(checkpoint, ignore_errors=True)
        publish(temporary, checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:  # what torch.save and safetensors make of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"checkpoint {checkpoint.name} can't be saved ({str(error).splitlines()[0]:.300})") from error


def is_finite(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether every number of a training's state is finite."""
    moments = (tensor for state in optimizer.state.values() for tensor in state.values())
    return all(bool(torch.isfinite(tensor).all()) for tensor in (*model.parameters(), *moments))


def restore(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint into `model` and `optimizer`."""
    device = next(model.parameters()).device
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True))
    except Exception as error:  # a damaged one can raise any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{checkpoint}: can't be restored ({reason:.300})") from error
