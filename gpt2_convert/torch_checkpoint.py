"""The format `torch`: checkpoints of the PyTorch trainer; also a state dict with config.yaml beside it."""

import json
from pathlib import Path

from gpt2_convert.format import Format, Holds
from gpt2_convert.source import Source
from gpt2_core.config.io import from_yaml, model_from_dict
from gpt2_core.errors import UserError
from gpt2_core.runs.folder import metadata_of_weights, metadata_path
from gpt2_core.weights import LazyArrays, Weights
from gpt2_core.weights.layouts import TORCH
from gpt2_core.weights.safetensors import write_tensors

_WEIGHTS = "model.safetensors"
_RECIPE = "config.yaml"


def detect(source: Source) -> bool:
    metadata = source.checkpoint_metadata
    return metadata["framework"] == "torch" if metadata is not None else source.tensors is not None


def read(source: Source) -> Weights:
    if source.path.is_file() and source.checkpoint_metadata is None:
        return _read_state_dict(source)
    metadata = source.checkpoint_of("torch")
    config = model_from_dict(metadata["model"], str(source.folder))
    file = source.file(_WEIGHTS)
    arrays = TORCH.decode(file.safetensors[0], config, str(file.path))
    return Weights(config, LazyArrays(arrays), str(source.folder), metadata["tokenizer"])


def write(weights: Weights, folder: Path) -> None:
    """A checkpoint of `weights` without training state: a run can start from it (--init_from), not resume it."""
    path = metadata_path(folder)
    path.parent.mkdir(parents=True)
    write_tensors(folder / _WEIGHTS, TORCH.encode(weights.tensors, weights.config), {"format": "pt"})
    path.write_text(json.dumps(metadata_of_weights(weights, "torch")))


def _read_state_dict(source: Source) -> Weights:
    path = source.path
    if source.tensors is None:
        raise UserError(f"{path}: not a state dict, which has a tensor for each name")
    if not source.has(_RECIPE):
        raise UserError(
            f"{path}: a state dict doesn't say what model it belongs to (the number of heads, for one); put the "
            f"{_RECIPE} of its run beside it, or give the run folder"
        )
    config = from_yaml(source.folder / _RECIPE)
    arrays = TORCH.decode(source.tensors, config.model, str(path))
    return Weights(config.model, LazyArrays(arrays), str(path), config.data.tokenizer)


FORMAT = Format(
    layout=TORCH,
    holds=~Holds(0),
    described="a run folder or checkpoint of this project",
    help="a checkpoint of the PyTorch trainer",
    detect=detect,
    read=read,
    write=write,
    owns=lambda name: name in ("metadata", _WEIGHTS, "optimizer.pt"),
)
