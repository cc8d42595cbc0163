"""Which format a file or folder has, by what it holds and not by its name."""

import struct
from pathlib import Path

from gpt2_convert import hugging_face, nanogpt
from gpt2_core.errors import UserError
from gpt2_core.run_folder import metadata_path, read_metadata
from gpt2_core.weights.llmc import MAGIC
from gpt2_core.weights.safetensors import FORMAT, open_tensors

EXPECTED = (
    "expected a run folder or checkpoint of this project, a Hugging Face GPT-2 folder (config.json), a checkpoint of "
    "nanoGPT (ckpt.pt), a model file of llm.c (.bin) or a .safetensors file of scripts/convert.py"
)


def detect(path: Path) -> str:
    """The format's name; raises UserError if it is none of ours."""
    form = _of_folder(path) if path.is_dir() else _of_file(path)
    if form is None:
        raise UserError(f"{path}: holds no weights that this project knows; {EXPECTED}")
    return form


def _of_folder(path: Path) -> str | None:
    if metadata_path(path).is_file():
        return read_metadata(path)["framework"]
    return "hf" if (path / hugging_face.CONFIG).is_file() else None


def _of_file(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == struct.pack("<i", MAGIC):
        return "llmc"
    if head[8:9] == b"{":
        metadata = open_tensors(path)[1]
        if metadata.get("format") == FORMAT:
            return "safetensors"
        return _by_its_folder(path)
    from gpt2_convert.torch_files import is_torch_file

    if is_torch_file(path):
        return "nanogpt" if nanogpt.is_one(path) else _by_its_folder(path)
    return None


def _by_its_folder(path: Path) -> str | None:
    """A file of bare tensors is what the configuration beside it says."""
    if (path.parent / hugging_face.CONFIG).is_file():
        return "hf"
    return "torch"
