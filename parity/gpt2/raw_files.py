"""What the file of each format holds, stated a second time and read with the library of whoever made the format.

A reader and a writer with one mistake between them, such as layers in the order of their names, undo each other: their
round trip is bitwise, and no other program can read the file. The shapes are those of Hugging Face's GPT2LMHeadModel
(linear weights (in, out)), nanoGPT's model.py (nn.Linear, (out, in)), llm.c's train_gpt2.py (`write_tensors`) and
transformers 4's modeling_flax_gpt2.py (FlaxConv1D, (out, in)), written by flax.serialization.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import numpy as np
import torch
from safetensors.torch import load_file

from gpt2_core.weights import Weights

Bytes = dict[str, bytes]
"""The bytes of each tensor, by its name in the file."""

# transformers.activations.ACT2FN: names of GELU in its two forms.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_exact"}

_LLMC_HEADER = 1024
_LLMC_BLOCK = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj"


def expected(weights: Weights, form: str) -> Bytes:
    """What a file of GPT-2's own architecture should hold."""
    arrays = weights.arrays
    if form == "llmc":
        return {"the tensors": b"".join(_llmc(weights))}
    if form == "msgpack":
        return {_flax_path(name): _laid(array, name, True) for name, array in arrays.items()}
    prefix = "transformer." if form in ("hf", "nanogpt") else ""
    transposed = form in ("torch", "nanogpt")
    held = {prefix + name: _laid(array, name, transposed) for name, array in arrays.items()}
    return held | ({"lm_head.weight": arrays["wte.weight"].tobytes()} if form == "nanogpt" else {})


def _laid(array: np.ndarray, name: str, transposed: bool) -> bytes:
    is_linear = array.ndim == 2 and not name.startswith(("wte", "wpe"))
    return np.ascontiguousarray(array.T if transposed and is_linear else array).tobytes()


def _flax_path(name: str) -> str:
    """Keys of the nested dict: h.0.ln_1.weight is transformer, h, 0, ln_1, scale. The head is tied."""
    *modules, leaf = f"transformer.{name}".split(".")
    if leaf == "weight":
        leaf = "scale" if "ln_" in modules[-1] else "embedding" if modules[-1] in ("wte", "wpe") else "kernel"
    return "/".join((*modules, leaf))


def _llmc(weights: Weights) -> Iterator[bytes]:
    arrays, config = weights.arrays, weights.config
    missing = -config.vocab_size % 128
    yield np.pad(arrays["wte.weight"], ((0, missing), (0, 0))).tobytes()
    yield arrays["wpe.weight"].tobytes()
    for module in _LLMC_BLOCK.split():
        for kind in ("weight", "bias"):
            for layer in range(config.n_layer):
                yield _laid(arrays[f"h.{layer}.{module}.{kind}"], module, True)
    yield arrays["ln_f.weight"].tobytes()
    yield arrays["ln_f.bias"].tobytes()


def _of_tensors(tensors: dict[str, torch.Tensor]) -> Bytes:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def _of_flax(content: bytes) -> Bytes:
    """Extension type 1 is an array: its shape, its dtype's name, and its bytes."""
    return dict(_leaves(msgpack.unpackb(content, ext_hook=lambda code, packed: msgpack.unpackb(packed)[2])))


def _leaves(tree: dict, path: str = "") -> Iterator[tuple[str, bytes]]:
    for key, inside in tree.items():
        if isinstance(inside, dict):
            yield from _leaves(inside, f"{path}{key}/")
        else:
            yield path + key, inside


# How each file is opened without this project's readers. The `jax` checkpoint is this project's alone.
READERS: dict[str, Callable[[Path], Bytes]] = {
    "safetensors": lambda path: _of_tensors(load_file(path)),
    "torch": lambda path: _of_tensors(load_file(path / "model.safetensors")),
    "hf": lambda path: _of_tensors(load_file(path / "model.safetensors")),
    "nanogpt": lambda path: _of_tensors(torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["model"]),
    "msgpack": lambda path: _of_flax((path / "flax_model.msgpack").read_bytes()),
    "llmc": lambda path: {"the tensors": path.read_bytes()[_LLMC_HEADER:]},
}
