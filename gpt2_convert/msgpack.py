"""The format `msgpack`: transformers' GPT-2 for Flax (transformers 4), flax_model.msgpack beside config.json.

A large model is in shards, with an index from each array's path to its file, as for PyTorch's weights.

The layout is FlaxGPT2LMHeadModel's (transformers, models/gpt2/modeling_flax_gpt2.py): a nested dict of modules with the
leaves `embedding`, `scale`, `kernel` and `bias`. Its FlaxConv1D stores a kernel as (out, in), where PyTorch's Conv1D
stores (in, out); an untied head is an nn.Dense, which stores (in, out). flax.serialization writes the dict as msgpack,
an array as an extension type of shape, dtype and bytes, or as several where it exceeds 1 GiB. Nothing is unpickled.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np

from gpt2_convert import hugging_face
from gpt2_convert.format import GPT2, Format, Holds
from gpt2_convert.source import Source
from gpt2_core.errors import UserError, reason
from gpt2_core.files import writing
from gpt2_core.weights import DTYPES, LazyArrays, LazyTensor, Weights
from gpt2_core.weights.layouts import Layout, Placement
from gpt2_core.weights.safetensors import lazy_tensor_at

_WEIGHTS = "flax_model.msgpack"
_SOURCES = (_WEIGHTS, f"{_WEIGHTS}.index.json")
_PREFIX = "transformer/"
_LEAVES = {"wte": "embedding", "wpe": "embedding", "ln_1": "scale", "ln_2": "scale", "ln_f": "scale"}
# One of these is a file's first key: a model with a head has the first two, a bare one the others.
_MODULES = (b"transformer", b"lm_head", b"wte", b"wpe", b"h", b"ln_f")

_DTYPES = {dtype.name: dtype for dtype in (*DTYPES.values(), np.dtype(np.float16))}
# The first bytes of msgpack values that occur in such files (github.com/msgpack/msgpack/blob/master/spec.md). Some hold
# a small number or length: the first and last such byte, the kind, what the first stands for.
_SHORT = (
    (0x00, 0x7F, "number", 0),
    (0x80, 0x8F, "map", 0),
    (0x90, 0x9F, "array", 0),
    (0xA0, 0xBF, "string", 0),
    (0xC2, 0xC3, "number", 0),  # false and true
    (0xD8, 0xD8, "extension", 16),
)
# Others give the number of bytes after them that hold the number or length.
_LONG = {
    **{0xC4 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xC7 + i: ("extension", 1 << i) for i in range(3)},
    **{0xCC + i: ("number", 1 << i) for i in range(4)},
    **{0xD9 + i: ("string", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}


class _FlaxLayout(Layout):
    def placement(self, name: str, shape: tuple[int, ...]) -> Placement:
        *modules, kind = name.split(".")
        leaf = kind if kind == "bias" else _LEAVES.get(modules[-1], "kernel")
        stored_as = "/".join((*modules, leaf))
        if modules != ["lm_head"]:
            stored_as = _PREFIX + stored_as
        if leaf == "kernel":
            return Placement(stored_as, shape[::-1], np.transpose, np.transpose)
        return Placement(stored_as, shape, np.asarray, np.asarray)


LAYOUT = _FlaxLayout("msgpack", only=GPT2 | {"bias": (True,)})


def detect(source: Source) -> bool:
    if not source.has(hugging_face.CONFIG):
        return False
    if source.path.is_dir():  # with PyTorch's weights beside them, Flax's are a copy
        return any(map(source.has, _SOURCES)) and not any(map(source.has, hugging_face.SOURCES))
    # A map of at most 15 entries, and its first key, a string of at most 31 bytes.
    begins = tuple(bytes([0xA0 | len(module)]) + module for module in _MODULES)
    return source.head[:1] in [bytes([0x80 | size]) for size in range(1, 16)] and source.head[1:].startswith(begins)


def read(source: Source) -> Weights:
    """The weights of a folder, or of the folder that a file lies in."""
    config = hugging_face.read_config(source)
    file = hugging_face.weights_file(source, _SOURCES)
    found = hugging_face.open_whole_or_shards(file, (".msgpack",), lambda shard: _open(shard.path))
    named = hugging_face.prefixed(found, _PREFIX, "lm_head/kernel", file.path)
    arrays = LAYOUT.decode(named, config, str(file.path))
    written_here = source.file(hugging_face.CONFIG).json.get(hugging_face.TOKENIZER_METADATA)
    tokenizer = written_here if isinstance(written_here, str) else hugging_face.read_tokenizer(source)
    return Weights(config, LazyArrays(arrays), str(source.folder), tokenizer)


def write(weights: Weights, folder: Path) -> None:
    """A folder that transformers' FlaxGPT2LMHeadModel.from_pretrained loads."""
    from flax.traverse_util import unflatten_dict

    folder.mkdir()
    tree = unflatten_dict(LAYOUT.encode(weights.tensors, weights.config), sep="/")
    with writing(folder / _WEIGHTS) as file:
        _write_tree(tree, file, msgpack.Packer())
    known = {} if weights.tokenizer is None else {hugging_face.TOKENIZER_METADATA: weights.tokenizer}
    hugging_face.write_description(weights, folder, **known)


def _open(path: Path) -> dict[str, LazyTensor]:
    """The arrays of a file, by their paths: keys joined by slashes."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            found = dict(_flatten(_next(file, path, size)))
            if file.tell() != size:
                raise ValueError("there are bytes after its end")
    except Exception as error:
        # A damaged file can raise any exception.
        raise UserError(f"{path}: not a complete file of flax.serialization ({reason(error)})") from error
    for name, array in found.items():
        if not isinstance(array, LazyTensor):
            raise UserError(f"{path}: {name or 'the whole':.80} isn't an array")
    return found


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inside in value.items():
        yield from _flatten(inside, f"{name}/{key}" if name else str(key))


def _next(file: BinaryIO, path: Path, size: int) -> Any:
    """The msgpack value that begins here, with a `LazyTensor` instead of each array, whose values are skipped."""
    kind, number = _begin(file)
    if kind == "number":
        return number
    if kind == "array":
        return [_next(file, path, size) for _ in range(number)]
    if kind == "map":
        value = {_next(file, path, size): _next(file, path, size) for _ in range(number)}
        return _joined(value) if "__msgpack_chunked_array__" in value else value
    if number > size - file.tell():
        raise ValueError("it ends within a value")
    if kind == "extension":
        if file.read(1) != b"\x01":
            raise ValueError("it holds an extension type that isn't an array")
        return _array(file, path, size)
    content = file.read(number)
    return content.decode() if kind == "string" else content


def _begin(file: BinaryIO) -> tuple[str, int]:
    """The kind of the value that begins here, and the number itself or the value's length."""
    byte = file.read(1)[0]
    for first, last, kind, least in _SHORT:
        if first <= byte <= last:
            return kind, least + byte - first
    kind, width = _LONG[byte]
    return kind, int.from_bytes(file.read(width), "big")


def _array(file: BinaryIO, path: Path, size: int) -> LazyTensor:
    """What flax.serialization writes of an array: [shape, name of the dtype, bytes in rows]."""
    if _begin(file) != ("array", 3):
        raise ValueError("an array isn't shape, dtype and bytes")
    shape, name = _next(file, path, size), _next(file, path, size)
    kind, nbytes = _begin(file)
    stored = lazy_tensor_at(path, file.tell(), _DTYPES[name], shape)
    if kind != "bytes" or nbytes != stored.nbytes or nbytes > size - file.tell():
        raise ValueError("an array's bytes aren't those of its shape")
    file.seek(nbytes, 1)
    return stored


def _joined(value: dict[str, Any]) -> LazyTensor:
    """An array of more than 1 GiB, which is written in parts."""
    shape, parts = tuple(value["shape"].values()), list(value["chunks"].values())
    dtype = parts[0].dtype
    if {part.dtype for part in parts} != {dtype} or sum(math.prod(part.shape) for part in parts) != math.prod(shape):
        raise ValueError("the parts of an array don't add up to its shape")
    return LazyTensor(shape, dtype, lambda: np.concatenate([part.read() for part in parts]).reshape(shape))


def _write_tree(tree: dict[str, Any], file: BinaryIO, packer: msgpack.Packer) -> None:
    """Write what flax.serialization.msgpack_serialize gives for the whole tree, with one array in memory at a time."""
    from flax.serialization import msgpack_serialize

    file.write(packer.pack_map_header(len(tree)))
    for name, inside in tree.items():
        file.write(packer.pack(name))
        if isinstance(inside, dict):
            _write_tree(inside, file, packer)
        else:
            file.write(msgpack_serialize(inside.read()))


FORMAT = Format(
    layout=LAYOUT,
    holds=Holds.EXACT_GELU | Holds.SIZES | Holds.FLOAT64,
    described="a Hugging Face folder with Flax's weights (flax_model.msgpack)",
    help="a folder for transformers' FlaxGPT2LMHeadModel (transformers 4)",
    detect=detect,
    read=read,
    write=write,
    owns=lambda name: name.endswith((".msgpack", ".json")) or name == "merges.txt",
    hub=(("flax_model*.msgpack", f"{_WEIGHTS}.index.json"),),
)
