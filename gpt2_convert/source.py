"""A file or folder of weights while it is opened. Each part is read once, for detection and reading together."""

import functools
from pathlib import Path
from typing import Any

from gpt2_core.errors import UserError
from gpt2_core.parsing import json_object
from gpt2_core.runs.folder import metadata_path, read_metadata
from gpt2_core.weights import LazyTensor
from gpt2_core.weights.safetensors import open_tensors

# What torch.save's files begin with: a zip archive's signature, or the pickled number that versions before 2020 wrote.
TORCH_ZIP = b"PK\x03\x04"
TORCH_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class Source:
    """A file or folder. Each property is read when it is first asked for, and once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self._files: dict[str, Source] = {}

    def file(self, name: str) -> "Source":
        """The file `name` of this folder, or beside this file."""
        path = self.folder / name
        return self if path == self.path else self._files.setdefault(name, Source(path))

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    @functools.cached_property
    def head(self) -> bytes:
        """The first 16 bytes of a file; of a folder, none."""
        if self.path.is_dir():
            return b""
        with self.path.open("rb") as file:
            return file.read(16)

    @property
    def is_safetensors(self) -> bool:
        return self.head[8:9] == b"{"

    @property
    def is_torch(self) -> bool:
        return self.head.startswith((TORCH_ZIP, TORCH_OLD))

    @functools.cached_property
    def safetensors(self) -> tuple[dict[str, LazyTensor], dict[str, str]]:
        """The tensors and the metadata of a safetensors file."""
        return open_tensors(self.path)

    @functools.cached_property
    def torch(self) -> Any:
        """What torch.save wrote, with a `LazyTensor` instead of each tensor."""
        from gpt2_convert.torch_files import open_torch_file

        return open_torch_file(self.path)

    @functools.cached_property
    def json(self) -> dict[str, Any]:
        return json_object(self.path.read_bytes(), str(self.path))

    @property
    def tensors(self) -> dict[str, LazyTensor] | None:
        """The tensors of a safetensors file, or of a torch.save file that holds a state dict; None of any other."""
        if self.is_safetensors:
            return self.safetensors[0]
        if not self.is_torch or not isinstance(self.torch, dict):
            return None
        if not all(isinstance(tensor, LazyTensor) for tensor in self.torch.values()):
            return None
        return {str(name): tensor for name, tensor in self.torch.items()}

    @functools.cached_property
    def checkpoint_metadata(self) -> dict[str, Any] | None:
        """The metadata of the trainers' checkpoint that this folder is or this file lies in; None if it is none."""
        return read_metadata(self.folder) if metadata_path(self.folder).is_file() else None

    def checkpoint_of(self, framework: str) -> dict[str, Any]:
        """The same; raises UserError unless it is a checkpoint that the trainer of `framework` wrote."""
        metadata = self.checkpoint_metadata
        if metadata is None:
            raise UserError(f"{self.path}: not a checkpoint of the {framework} trainer; it has no metadata/metadata")
        if metadata["framework"] != framework:
            found = metadata["framework"]
            raise UserError(f"{self.path}: was written by the {found} trainer; use --from {found}")
        return metadata
