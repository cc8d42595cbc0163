"""Weights from whatever holds them, and to it: every format, found by looking at the file, and every direction."""

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gpt2_convert import hub, hugging_face, nanogpt, runs
from gpt2_convert.detection import detect
from gpt2_core.config import TrainConfig, differences
from gpt2_core.errors import UserError
from gpt2_core.weights import Weights, layouts, read_safetensors, write_safetensors
from gpt2_core.weights.layouts import Layout
from gpt2_core.weights.llmc import read_llmc, write_llmc


@dataclasses.dataclass(frozen=True)
class Format:
    """A reader and a writer, both to and from the canonical form."""

    layout: Layout
    read: Callable[[Path], Weights]
    write: Callable[[Weights, Path], object]
    is_folder: bool
    """Whether it is written as a folder, or as one file."""
    owns: Callable[[str], bool] = lambda name: False
    """Whether a file of this name in such a folder is the format's own."""


FORMATS = {
    "jax": Format(layouts.JAX, runs.read_jax, runs.write_jax, True, runs.owns_jax),
    "torch": Format(layouts.TORCH, runs.read_torch, runs.write_torch, True, runs.owns_torch),
    "hf": Format(layouts.HUGGING_FACE, hugging_face.read, hugging_face.write, True, hugging_face.owns),
    "nanogpt": Format(layouts.NANOGPT, nanogpt.read, nanogpt.write, False),
    "llmc": Format(layouts.LLMC, read_llmc, write_llmc, False),
    "safetensors": Format(layouts.CANONICAL, read_safetensors, write_safetensors, False),
}


def open_weights(
    source: str | Path, checkpoint: str = "latest", form: str | None = None, mlp: str | None = None
) -> Weights:
    """Weights at a path or of a hub's name, read one tensor at a time as they are asked for.

    `checkpoint` chooses one of a run folder's; `form` names the format, which is otherwise found by looking; `mlp` says
    which GELU a nanoGPT checkpoint was trained with. Raises UserError if there are none.
    """
    path = hub.fetch(str(source)) if hub.is_name(str(source)) else Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder" + hub.hint(str(source)))
    path = runs.chosen_checkpoint(path, checkpoint)
    try:
        form = form or detect(path)
        if mlp is None:
            return FORMATS[form].read(path)
        if form != "nanogpt":
            raise UserError(f"--mlp {mlp}: {path} is in the format {form}, which says its MLP; leave the option out")
        return nanogpt.read(path, mlp)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error


def read_weights(source: str | Path, checkpoint: str = "latest") -> Weights:
    """The same in memory, to compute with; tells on the standard error what a reader had to assume."""
    weights = open_weights(source, checkpoint)
    for note in weights.notes:
        print(f"note: {note}", file=sys.stderr)
    return weights.in_memory()


def read_initial_weights(config: TrainConfig) -> Weights | None:
    """The weights that `--init_from` names; raises UserError if they are another model's."""
    if config.init_from is None:
        return None
    weights = read_weights(config.init_from)
    # Dropout is a way of training; everything else is the model itself.
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
    """Write `weights` to `path` in a format, whole or not at all.

    With `force`, weights that are there are replaced once the new are whole. Raises UserError for anything else there,
    and for an architecture or a dtype that the format can't hold.
    """
    form = FORMATS[to]
    form.layout.check_holds(weights.config)
    if to == "safetensors" and path.suffix != ".safetensors":
        raise UserError(f"{path}: a safetensors file has a name that ends in .safetensors")
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
            new.rename(path)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})") from error


def _check_free(path: Path, form: Format, force: bool) -> None:
    if not path.exists() or (form.is_folder and path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise UserError(f"{path}: exists; add --force to replace it, or name another")
    if path.is_file() != (not form.is_folder):
        kinds = ("a folder", "a file")
        raise UserError(
            f"{path}: is {kinds[path.is_file()]}, which {kinds[not form.is_folder]} doesn't replace; name another"
        )
    try:
        there = detect(path)
    except UserError as error:
        raise UserError(f"{path}: exists and holds no weights, so nothing here replaces it; name another") from error
    if path.is_dir() and (foreign := _foreign(path, FORMATS[there])):
        raise UserError(f"{path}: holds {foreign} besides weights, which nothing here replaces; name another")


def _foreign(folder: Path, form: Format) -> str | None:
    return next((f.name for f in sorted(folder.iterdir()) if not form.owns(f.name)), None)


def _check_space(path: Path, weights: Weights) -> None:
    free = shutil.disk_usage(path.parent).free
    if weights.nbytes > free:
        raise UserError(
            f"{path}: needs {weights.nbytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; make room, or "
            "name a place on another disk"
        )
