"""Weights of any format: `open_weights` and `write_weights` convert, the registry lists the formats."""

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from gpt2_convert import hub
from gpt2_convert.format import Format, Holds
from gpt2_convert.registry import FORMATS, described, detect
from gpt2_convert.source import Source
from gpt2_core.config import ModelConfig, TrainConfig
from gpt2_core.config.io import differences
from gpt2_core.errors import UserError
from gpt2_core.files import publish
from gpt2_core.runs.folder import RunFolder, metadata_path
from gpt2_core.weights import Weights

__all__ = [
    "FORMATS",
    "Holds",
    "describe",
    "described",
    "open_weights",
    "read_initial_weights",
    "read_weights",
    "write_weights",
]


def open_weights(
    source: str | Path, checkpoint: str = "latest", form: str | None = None, mlp: str | None = None
) -> Weights:
    """The weights at a path, or of a model on the Hub; each tensor is read when it is asked for.

    `checkpoint` chooses one of a run folder's; `form` names the format, which is otherwise detected; `mlp` is the GELU
    that the model was trained with, for formats that don't record it. Raises UserError if there are no weights.
    """
    path = _fetch(str(source)) if hub.is_name(str(source)) else Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder" + hub.hint(str(source)))
    path = _chosen_checkpoint(path, checkpoint)
    opened = Source(path)
    try:
        found = FORMATS[form] if form else detect(opened)
        if mlp is None:
            return found.read(opened)
        if not found.assumes:
            raise UserError(
                f"--mlp {mlp}: {path} is in the format {found.name}, which records its MLP; leave the option out"
            )
        return found.read(opened, mlp)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error


def read_weights(source: str | Path, checkpoint: str = "latest") -> Weights:
    """The same, read into memory to compute with; prints on stderr what the reader had to assume."""
    weights = open_weights(source, checkpoint)
    for note in weights.notes:
        print(f"note: {note}", file=sys.stderr)
    return weights.in_memory()


def describe(source: str | Path) -> tuple[ModelConfig, str | None]:
    """Architecture of the weights at a path or of a model on the Hub, and their tokenizer where it is recorded."""
    weights = open_weights(source)
    return weights.config, weights.tokenizer


def read_initial_weights(config: TrainConfig) -> Weights | None:
    """The weights that `--init_from` names; raises UserError if they are another model's."""
    if config.init_from is None:
        return None
    weights = read_weights(config.init_from)
    # Dropout belongs to the training; everything else is the model itself.
    theirs = dataclasses.replace(weights.config, dropout=config.model.dropout)
    if changed := list(differences(config.model, theirs)):
        said = ", ".join(f"{name} {their} where this run has {ours}" for name, ours, their in changed)
        options = " ".join(f"--model.{name} {str(their).lower()}" for name, _, their in changed)
        raise UserError(f"--init_from {config.init_from}: those weights have {said}; add {options}")
    if weights.tokenizer not in (None, config.data.tokenizer):
        raise UserError(
            f"--init_from {config.init_from}: those weights were trained with the tokenizer {weights.tokenizer}, this "
            f"run has {config.data.tokenizer}; use --data.tokenizer {weights.tokenizer}"
        )
    return weights


def write_weights(weights: Weights, path: Path, to: str, *, force: bool = False) -> None:
    """Write `weights` to `path` in a format, completely or not at all.

    With `force`, weights at `path` are replaced once the new ones are complete. Raises UserError if anything else is
    there, and for an architecture or a dtype that the format can't hold.
    """
    form = FORMATS[to]
    form.layout.check_holds(weights.config)
    if not path.name.endswith(form.suffix):
        raise UserError(f"{path}: the name of a {to} file must end in {form.suffix}")
    _check_free(path, form, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path, weights)
        if not form.is_folder:
            form.write(weights, path)
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            new = Path(temporary) / "new"
            form.write(weights, new)
            if path.exists():
                path.rename(Path(temporary) / "old")
            publish(new, path)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})") from error


def _fetch(name: str) -> Path:
    return hub.fetch(name, [patterns for form in FORMATS.values() for patterns in form.hub])


def _chosen_checkpoint(path: Path, choice: str) -> Path:
    """The checkpoint of a run folder that `choice` names; a path that isn't a run folder, unchanged."""
    if path.is_dir() and (path / "config.yaml").is_file() and not metadata_path(path).is_file():
        return RunFolder(path).checkpoint(choice)
    if choice != "latest":
        raise UserError(
            f"--checkpoint {choice}: {path} isn't a run folder, so there is one set of weights; leave it out"
        )
    return path


def _check_free(path: Path, form: Format, force: bool) -> None:
    if not path.exists() or (form.is_folder and path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise UserError(f"{path}: exists; add --force to replace it, or name another target")
    if path.is_file() != (not form.is_folder):
        kinds = ("a folder", "a file")
        raise UserError(
            f"{path}: is {kinds[path.is_file()]}, and --to {form.name} writes {kinds[not form.is_folder]}; name "
            "another target"
        )
    try:
        there = detect(Source(path))
    except UserError as error:
        raise UserError(f"{path}: holds no weights, so --force doesn't replace it; name another target") from error
    if path.is_dir() and (foreign := _foreign(path, there)):
        raise UserError(f"{path}: also holds {foreign}, which --force would delete; name another target")


def _foreign(folder: Path, form: Format) -> str | None:
    return next((f.name for f in sorted(folder.iterdir()) if not form.owns(f.name)), None)


def _check_space(path: Path, weights: Weights) -> None:
    free = shutil.disk_usage(path.parent).free
    if weights.nbytes > free:
        raise UserError(
            f"{path}: needs {weights.nbytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; free some space, "
            "or name a target on another disk"
        )
