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

from gpt2_core.config import model_from_dict
from gpt2_core.errors import UserError
from gpt2_core.run_folder import metadata_of_weights, metadata_path, read_metadata
from gpt2_core.weights import StoredArrays, Weights
from gpt2_core.weights.layouts import TORCH
from gpt2_core.weights.safetensors import open_tensors, write_tensors


def save(
    checkpoint: Path,
    state: dict[str, Tensor],
    metadata: dict[str, Any],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the folder `checkpoint`, whole or not at all; replaces one of the same step."""
    temporary = _begin(checkpoint)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / "model.safetensors")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    _finish(temporary, checkpoint, metadata)


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
    temporary = _begin(checkpoint)
    write_tensors(temporary / "model.safetensors", TORCH.encode(weights.stored, weights.config), {"format": "pt"})
    return _finish(temporary, checkpoint, metadata_of_weights(weights, "torch"))


def read_weights(checkpoint: Path) -> Weights:
    """The canonical weights of a checkpoint, read as they are asked for."""
    metadata = read_metadata(checkpoint)
    found, _ = open_tensors(checkpoint / "model.safetensors")
    config = model_from_dict(metadata["model"], str(checkpoint))
    arrays = TORCH.decode(found, config, str(checkpoint / "model.safetensors"))
    return Weights(config, StoredArrays(arrays), str(checkpoint), metadata["tokenizer"])


def _begin(checkpoint: Path) -> Path:
    temporary = checkpoint.with_name(f".{checkpoint.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    metadata_path(temporary).parent.mkdir(parents=True)
    return temporary


def _finish(temporary: Path, checkpoint: Path, metadata: dict[str, Any]) -> Path:
    metadata_path(temporary).write_text(json.dumps(metadata))
    shutil.rmtree(checkpoint, ignore_errors=True)
    return temporary.rename(checkpoint)
