"""The format `safetensors`: the canonical form in one file, with the configuration in its metadata."""

import dataclasses
import json
from pathlib import Path

from gpt2_convert.format import Format, Holds
from gpt2_convert.source import Source
from gpt2_core.config.io import model_from_dict
from gpt2_core.errors import UserError
from gpt2_core.parsing import json_object
from gpt2_core.weights import LazyArrays, Weights
from gpt2_core.weights.layouts import CANONICAL
from gpt2_core.weights.safetensors import write_tensors

_FORMAT = "gpt2-jax canonical 1"


def detect(source: Source) -> bool:
    return source.is_safetensors and source.safetensors[1].get("format") == _FORMAT


def read(source: Source) -> Weights:
    """What `write` wrote; raises UserError for anything else."""
    path = source.path
    tensors, metadata = source.safetensors
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path}: a safetensors file without this project's metadata; expected one that gpt2 convert wrote"
        )
    config = model_from_dict(json_object(metadata.get("model", ""), f"{path}: its metadata 'model'"), str(path))
    arrays = CANONICAL.decode(tensors, config, str(path))
    return Weights(config, LazyArrays(arrays), str(path), metadata.get("tokenizer") or None)


def write(weights: Weights, path: Path) -> None:
    """Write `weights` to `path`; a reader of any framework finds the names and shapes that Hugging Face uses."""
    model = dataclasses.asdict(weights.config)
    metadata = {"format": _FORMAT, "model": json.dumps(model), "tokenizer": weights.tokenizer or ""}
    write_tensors(path, CANONICAL.encode(weights.tensors, weights.config), metadata)


FORMAT = Format(
    layout=CANONICAL,
    holds=~Holds(0),
    described="a .safetensors file of gpt2 convert",
    help="one file with GPT-2's own names and shapes",
    detect=detect,
    read=read,
    write=write,
    suffix=".safetensors",
)
