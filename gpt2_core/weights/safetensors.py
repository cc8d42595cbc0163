"""Files of tensors in the safetensors format, written and read one tensor at a time.

The safetensors library checks a file's header against its length when it opens it; the values are then read from their
place in the file. The library's own writer needs the whole model in memory, which a conversion never has.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_core.errors import UserError
from gpt2_core.files import writing
from gpt2_core.weights.canonical import DTYPES, LazyTensor

_DTYPES = {
    "F64": DTYPES["float64"],
    "F32": DTYPES["float32"],
    "BF16": DTYPES["bfloat16"],
    **{"F16": np.dtype(np.float16), "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I64": np.dtype(np.int64)},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, reading each tensor when its turn comes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values begin at a multiple of 8
    with writing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        write_values(file, tensors.values())


def write_values(file: BinaryIO, tensors: Iterable[LazyTensor]) -> None:
    """Write the tensors' values one after the other, row by row, little-endian."""
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.read())
        # numpy has no buffer of bfloat16 to give.
        file.write(array.reshape(-1).view(np.uint8).data)


def open_tensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file; raises UserError if it isn't a whole one."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (OSError, SafetensorError, ValueError, RecursionError, struct.error) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} is {entry['dtype']}; expected {', '.join(DTYPES)}")
        tensors[name] = lazy_tensor_at(
            path, 8 + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]], entry["shape"]
        )
    return tensors, metadata


def lazy_tensor_at(path: Path, offset: int, dtype: np.dtype, shape: Iterable[int]) -> LazyTensor:
    """The tensor whose values begin `offset` bytes into a file; the caller has checked that they all lie in it."""
    shape = tuple(shape)
    nbytes = LazyTensor(shape, dtype, lambda: np.empty(0)).nbytes

    def read() -> np.ndarray:
        values = np.fromfile(path, np.uint8, nbytes, offset=offset)
        if len(values) < nbytes:
            raise UserError(f"{path}: ends inside a tensor: it was changed while it was read; try again")
        return values.view(dtype).reshape(shape)

    return LazyTensor(shape, dtype, read)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} appears twice")
        found[name] = value
    return found
