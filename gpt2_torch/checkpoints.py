"""A checkpoint of the PyTorch trainer: model.safetensors (the state dict), optimizer.pt, metadata."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.run_folder import metadata_of_weights, metadata_path, read_metadata
from gpt2_core.weights import Weights
from gpt2_torch.weights import to_canonical, to_state_dict


def save(
    checkpoint: Path,
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write the folder `checkpoint`, whole or not at all; replaces one of the same step.

    Without an optimizer the checkpoint holds weights to start from, and can't be resumed.
    """
    temporary = checkpoint.with_name(f".{checkpoint.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    metadata_path(temporary).parent.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / "model.safetensors")
    if optimizer is not None:
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    metadata_path(temporary).write_text(json.dumps(metadata))
    shutil.rmtree(checkpoint, ignore_errors=True)
    temporary.rename(checkpoint)


def restore(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint into `model` and `optimizer`."""
    device = next(model.parameters()).device
    try:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True))
    except (OSError, EOFError, SafetensorError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint}: can't be restored ({error})") from error


def write_weights(weights: Weights, checkpoint: Path) -> Path:
    """A checkpoint of `weights` alone; returns its folder."""
    save(checkpoint, to_state_dict(weights), metadata_of_weights(weights, "torch"))
    return checkpoint


def read_weights(checkpoint: Path) -> Weights:
    """The canonical weights of a checkpoint."""
    metadata = read_metadata(checkpoint)
    try:
        state = load_file(checkpoint / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: can't be read ({error})") from error
    return to_canonical(state, ModelConfig(**metadata["model"]), str(checkpoint), metadata["tokenizer"])
