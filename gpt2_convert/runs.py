"""Run folders and checkpoints of this project's two trainers."""

from pathlib import Path

from gpt2_core.config import from_yaml
from gpt2_core.errors import UserError
from gpt2_core.run_folder import RunFolder, metadata_path, read_metadata
from gpt2_core.weights import StoredArrays, Weights
from gpt2_core.weights.layouts import TORCH
from gpt2_core.weights.safetensors import open_tensors

# Each function imports its own side, so that one trainer starts without the other's framework.


def chosen_checkpoint(path: Path, choice: str) -> Path:
    """The checkpoint of a run folder that `choice` names; any other path as it is, which leaves nothing to choose."""
    if path.is_dir() and (path / "config.yaml").is_file() and not metadata_path(path).is_file():
        return RunFolder(path).checkpoint(choice)
    if choice != "latest":
        raise UserError(f"--checkpoint {choice}: {path} is no run folder with checkpoints to choose from; leave it out")
    return path


def read_jax(path: Path) -> Weights:
    _check_framework(path, "jax")
    from gpt2_jax.checkpoints import read_weights

    return read_weights(path)


def write_jax(weights: Weights, path: Path) -> None:
    from gpt2_jax.checkpoints import write_weights

    write_weights(weights, path)


def owns_jax(name: str) -> bool:
    return name in ("_CHECKPOINT_METADATA", "commit_success.txt", "metadata", "state")


def read_torch(path: Path) -> Weights:
    """A checkpoint of the PyTorch trainer, or a bare state dict with a run's config.yaml beside it."""
    if path.is_file() and metadata_path(path.parent).is_file():
        path = path.parent
    if path.is_file():
        return _read_state_dict(path)
    _check_framework(path, "torch")
    from gpt2_torch.checkpoints import read_weights

    return read_weights(path)


def write_torch(weights: Weights, path: Path) -> None:
    from gpt2_torch.checkpoints import write_weights

    write_weights(weights, path)


def owns_torch(name: str) -> bool:
    return name in ("metadata", "model.safetensors", "optimizer.pt")


def _check_framework(path: Path, framework: str) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: is a file; a checkpoint of the {framework} trainer is a folder")
    found = read_metadata(path)["framework"]
    if found != framework:
        raise UserError(f"{path}: was written by the {found} trainer; use --from {found}")


def _read_state_dict(path: Path) -> Weights:
    from gpt2_convert.torch_files import is_torch_file, open_torch_file

    found = open_torch_file(path) if is_torch_file(path) else open_tensors(path)[0]
    recipe = path.parent / "config.yaml"
    if not recipe.is_file():
        raise UserError(
            f"{path}: a state dict doesn't say what model it belongs to (the number of heads, for one); put the "
            f"config.yaml of its run beside it, or give the run folder"
        )
    config = from_yaml(recipe)
    arrays = TORCH.decode(found, config.model, str(path))
    return Weights(config.model, StoredArrays(arrays), str(path), config.data.tokenizer)
