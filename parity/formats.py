"""Weights from whatever holds them: a run folder or checkpoint of either trainer, or a canonical .safetensors file."""

import dataclasses
from pathlib import Path

from gpt2_core.config import TrainConfig, differences
from gpt2_core.errors import UserError
from gpt2_core.run_folder import RunFolder, metadata_path, read_metadata
from gpt2_core.weights import Weights, read_safetensors


def read_weights(path: str | Path, checkpoint: str = "latest") -> Weights:
    """Canonical weights from `path`; `checkpoint` chooses one of a run folder's. Raises UserError if there are none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: expected a run folder, a checkpoint folder or a .safetensors file")
        return read_safetensors(path)
    if not metadata_path(path).is_file():
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path}: neither a run folder (no config.yaml) nor a checkpoint of one")
        path = RunFolder(path).checkpoint(checkpoint)
    # Imported here, so that each trainer starts without the other's framework.
    if read_metadata(path)["framework"] == "jax":
        from gpt2_jax.checkpoints import read_weights as read
    else:
        from gpt2_torch.checkpoints import read_weights as read
    return read(path)


def read_initial_weights(config: TrainConfig) -> Weights | None:
    """The weights that `--init_from` names; raises UserError if they are another model's."""
    if config.init_from is None:
        return None
    weights = read_weights(config.init_from)
    # Dropout is a way of training; everything else is the model itself.
    theirs = dataclasses.replace(weights.config, dropout=config.model.dropout)
    for name, ours, their in differences(config.model, theirs):
        raise UserError(
            f"--init_from {config.init_from}: those weights have {name} {their}, this run {ours}; "
            f"add --model.{name} {their}"
        )
    return weights
