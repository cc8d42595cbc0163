"""Weights from whatever holds them: a run folder or checkpoint of either trainer, or a canonical .safetensors file."""

import dataclasses
import tempfile
from pathlib import Path

from gpt2_core.config import TrainConfig, differences
from gpt2_core.errors import UserError
from gpt2_core.run_folder import RunFolder, metadata_path, read_metadata
from gpt2_core.weights import Weights, read_safetensors, write_safetensors


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
    if weights.tokenizer not in (None, config.data.tokenizer):
        raise UserError(
            f"--init_from {config.init_from}: those weights were trained with the tokenizer {weights.tokenizer}, this "
            f"run has {config.data.tokenizer}; use --data.tokenizer {weights.tokenizer}"
        )
    return weights


def write_weights(weights: Weights, path: Path, to: str, *, force: bool = False) -> None:
    """Write `weights` to `path` in a format: jax or torch (a checkpoint folder), or safetensors (one file).

    With `force`, weights that are there are replaced once the new are whole; raises UserError for anything else there.
    """
    if to == "safetensors" and path.suffix != ".safetensors":
        raise UserError(f"{path}: a safetensors file has a name that ends in .safetensors")
    replaceable = path.is_file() if to == "safetensors" else metadata_path(path).is_file()
    empty = path.is_dir() and to != "safetensors" and not any(path.iterdir())
    if path.exists() and not (force and (replaceable or empty)):
        what = "is not a weights file" if to == "safetensors" else "is neither empty nor a checkpoint"
        raise UserError(f"{path}: exists and {what}, which nothing here replaces; name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if to == "safetensors":
            write_safetensors(weights, path)
            return
        if to == "jax":
            from gpt2_jax.checkpoints import write_weights as write
        else:
            from gpt2_torch.checkpoints import write_weights as write
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            new = write(weights, Path(temporary) / "new")
            if path.exists():
                path.rename(Path(temporary) / "old")
            new.rename(path)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from error
