"""Weights as one .safetensors file: canonical names and orientation, the configuration in the metadata."""

import dataclasses
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically
from gpt2_core.weights.canonical import Weights

_FORMAT = "gpt2-jax canonical 1"


def write_safetensors(weights: Weights, path: Path) -> None:
    """Write `weights` to `path`; a reader of any framework finds the names and shapes that Hugging Face uses."""
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(dataclasses.asdict(weights.config)),
        "tokenizer": weights.tokenizer or "",
    }
    write_atomically(path, save(dict(weights.arrays), metadata))


def read_safetensors(path: Path) -> Weights:
    """Read what `write_safetensors` wrote; raises UserError for anything else."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(
                    f"{path}: a safetensors file without this project's metadata; "
                    "expected one that scripts/convert.py wrote"
                )
            config = ModelConfig(**json.loads(metadata["model"]))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a safetensors file of this project ({error})") from error
    return Weights(config, arrays, str(path), metadata.get("tokenizer") or None)
