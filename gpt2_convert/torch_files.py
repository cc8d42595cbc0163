"""PyTorch's own files, opened without unpickling anything but tensors and plain containers, and without reading the
tensors until they are asked for."""

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gpt2_convert.source import TORCH_ZIP
from gpt2_core.errors import UserError, reason
from gpt2_core.weights import DTYPES, LazyTensor
from gpt2_core.weights.safetensors import lazy_tensor_at
from gpt2_torch.weights import to_array

_DTYPES = {
    torch.float32: DTYPES["float32"],
    torch.bfloat16: DTYPES["bfloat16"],
    torch.float64: DTYPES["float64"],
    torch.float16: np.dtype(np.float16),
    torch.bool: np.dtype(np.bool_),
    torch.uint8: np.dtype(np.uint8),
    torch.int64: np.dtype(np.int64),
}


class GPTConfig:
    """An empty class that is unpickled instead of build-nanogpt's dataclass of this name, which its checkpoints hold
    an object of."""


def open_torch_file(path: Path) -> Any:
    """What torch.save wrote: containers and numbers as they are, a `LazyTensor` instead of each tensor.

    Nothing is unpickled but tensors, plain containers and `GPTConfig`. Raises UserError for a file that holds anything
    else, or that isn't whole.
    """
    with path.open("rb") as file:
        zipped = file.read(len(TORCH_ZIP)) == TORCH_ZIP
    if zipped:
        _check_entries(path)
    # Fake tensors have a shape and an offset in the file but no memory, so a damaged file can't cause an allocation.
    fakes = _load(path, fake=True)
    source = path if zipped else _OldFile(path)
    try:
        return _replace(fakes, (), {}, path, source)
    except RecursionError as error:
        raise UserError(f"{path}: its containers are nested too deeply") from error


class _OldFile:
    """A file in the format from before 2020, whose tensors have no known offsets: it is read whole, and each tensor is
    released once it has been read, so that memory holds the model once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[tuple, Tensor] = {}

    def read(self, keys: tuple) -> np.ndarray:
        if keys not in self._tensors:
            self._tensors = {}
            self._collect(_load(self.path, fake=False), ())
        return to_array(self._tensors.pop(keys))

    def _collect(self, value: Any, keys: tuple) -> None:
        if isinstance(value, Tensor):
            self._tensors[keys] = value
        for key, inside in _items(value):
            self._collect(inside, (*keys, key))


class _Bounded(io.BufferedReader):
    """A file whose reads are limited to its size: otherwise Python allocates what a damaged pickle asks for."""

    def read(self, size: int | None = -1) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def _load(path: Path, *, fake: bool) -> Any:
    try:
        # An open file, since PyTorch takes a path that ends in .safetensors for another format.
        with (
            _Bounded(io.FileIO(path)) as file,
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(GPTConfig, "__main__.GPTConfig")]),
        ):
            warnings.simplefilter("ignore")  # of what a damaged pickle may be
            if fake:
                with FakeTensorMode():
                    return torch.load(file, weights_only=True)
            return torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        what = str(error).partition("GLOBAL ")[2].split(" ")[0]
        found = f"an object of {what}" if what else "an object"
        raise UserError(
            f"{path}: holds {found}, and only tensors and plain containers are read from PyTorch's files"
        ) from error
    except Exception as error:
        # A damaged pickle can raise any exception.
        raise UserError(f"{path}: not a complete file of PyTorch ({reason(error)})") from error


def _check_entries(path: Path) -> None:
    """Refuse compressed entries, which could expand to any size, and entries larger than the file."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a complete file of PyTorch ({error})") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size or entry.compress_size > size:
            raise UserError(
                f"{path}: not a complete file of PyTorch (its entry {entry.filename} is compressed or too large)"
            )


def _replace(value: Any, keys: tuple, seen: dict, path: Path, source: Path | _OldFile) -> Any:
    """`value` with a LazyTensor instead of each tensor; tensors that share their memory share the LazyTensor."""
    if isinstance(value, Tensor):
        key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if key not in seen:
            seen[key] = _stored(value, keys, path, source)
        return seen[key]
    if isinstance(value, dict):
        return {key: _replace(inside, (*keys, key), seen, path, source) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(inside, (*keys, i), seen, path, source) for i, inside in enumerate(value)]
    return value


def _items(value: Any):
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _stored(fake: FakeTensor, keys: tuple, path: Path, source: Path | _OldFile) -> LazyTensor:
    name = ".".join(map(str, keys))
    if not isinstance(fake, FakeTensor) or fake.layout != torch.strided or fake.dtype not in _DTYPES:
        raise UserError(f"{path}: {name} is {fake.dtype}, {fake.layout}; expected {', '.join(DTYPES)}")
    storage, item, shape = fake.untyped_storage(), fake.dtype.itemsize, tuple(fake.shape)
    begin = fake.storage_offset() * item
    span = 0 if 0 in shape else item * (1 + sum((n - 1) * s for n, s in zip(shape, fake.stride(), strict=True)))
    size = path.stat().st_size
    offset = storage._checkpoint_offset if isinstance(source, Path) else 0
    if begin + span > storage.nbytes() or offset + storage.nbytes() > size or fake.numel() * item > size:
        raise UserError(f"{path}: {name} reaches beyond the end of the file")
    dtype = _DTYPES[fake.dtype]
    if isinstance(source, _OldFile):
        return LazyTensor(shape, dtype, lambda: source.read(keys))
    flat = lazy_tensor_at(path, offset + begin, dtype, (span // item,))
    if fake.is_contiguous():
        return flat.map(shape, lambda a: a.reshape(shape))
    strides = tuple(s * item for s in fake.stride())
    return flat.map(shape, lambda a: np.lib.stride_tricks.as_strided(a, shape, strides))
