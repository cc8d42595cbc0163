"""The format `msgpack`: transformers' GPT-2 for Flax (transformers 4), flax_model.msgpack beside config.json.

The layout is FlaxGPT2LMHeadModel's (transformers, models/gpt2/modeling_flax_gpt2.py): a nested dict of modules with the
leaves `embedding`, `scale`, `kernel` and `bias`. Its FlaxConv1D stores a kernel as (out, in), where PyTorch's Conv1D
stores (in, out); an untied head is an nn.Dense, which stores (in, out). flax.serialization writes the dict as msgpack,
an array as an extension type of shape, dtype and bytes, or as several where it exceeds 1 GiB. Nothing is unpickled.
"""

import mmap
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np

from gpt2_convert import hugging_face
from gpt2_convert.format import GPT2, Format, Holds
from gpt2_convert.source import Source
from gpt2_core.errors import UserError
from gpt2_core.files import writing
from gpt2_core.weights import LazyArrays, LazyTensor, Weights
from gpt2_core.weights.layouts import Layout, Placement

_WEIGHTS = "flax_model.msgpack"
_PREFIX = "transformer/"
_LEAVES = {"wte": "embedding", "wpe": "embedding", "ln_1": "scale", "ln_2": "scale", "ln_f": "scale"}
# One of these is a file's first key: a model with a head has the first two, a bare one the others.
_MODULES = (b"transformer", b"lm_head", b"wte", b"wpe", b"h", b"ln_f")


class _FlaxLayout(Layout):
    def place(self, name: str, shape: tuple[int, ...]) -> Placement:
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
        return source.has(_WEIGHTS) and not any(map(source.has, hugging_face.SOURCES))
    # A map of at most 15 entries, and its first key, a string of at most 31 bytes.
    begins = tuple(bytes([0xA0 | len(module)]) + module for module in _MODULES)
    return source.head[:1] in [bytes([0x80 | size]) for size in range(1, 16)] and source.head[1:].startswith(begins)


def read(source: Source) -> Weights:
    """The weights of a folder, or of the folder that a file lies in; the file is read whole."""
    config = hugging_face.read_config(source)
    path = source.path if source.path.is_file() else source.folder / _WEIGHTS
    found = hugging_face.prefixed(_restore(path), _PREFIX, "lm_head/kernel", path)
    arrays = LAYOUT.decode(found, config, str(path))
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


def _restore(path: Path) -> dict[str, LazyTensor]:
    """The arrays of a file, by the names on the way to them with slashes between."""
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    try:
        # Mapped, since the arrays are copies: read into memory, the file would be there twice.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            arrays = flatten_dict(msgpack_restore(content), sep="/")
    except Exception as error:
        # Damaged files end in any kind of error.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a whole file of flax.serialization ({reason:.200})") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise UserError(f"{path}: {name:.80} isn't an array")
    return {name: LazyTensor(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def _write_tree(tree: dict[str, Any], file: BinaryIO, packer: msgpack.Packer) -> None:
    """What flax.serialization.msgpack_serialize makes of the whole tree, with one array in memory at a time."""
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
    owns=lambda name: name == _WEIGHTS or name.endswith(".json") or name == "merges.txt",
    hub=((_WEIGHTS,),),
)
