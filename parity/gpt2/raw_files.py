"""What the file of each format holds, stated a second time and read with the library of whoever made the format.

A reader and a writer with one mistake between them, such as layers in the order of their names, undo each other: their
round trip is bitwise, and no other program can read the file. The shapes are those of Hugging Face's GPT2LMHeadModel
(linear weights (in, out)), its FlaxGPT2LMHeadModel (FlaxConv1D (out, in), nn.Dense (in, out)), nanoGPT's model.py
(nn.Linear, (out, in)) and llm.c's train_gpt2.py (`write_tensors`).

`WRITERS` make files as those programs write them, without this project's writers.
"""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import flax.serialization
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.torch import load_file, save_file

from gpt2_convert import hugging_face
from gpt2_core.weights import Weights

Bytes = dict[str, bytes]
"""The bytes of each tensor, by its name in the file."""

# transformers.activations.ACT2FN: names of GELU in its two forms.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_exact"}

# transformers' GPT2Config: what a setting is that config.json leaves out, by this project's name.
HF_DEFAULTS = {
    "vocab_size": ("vocab_size", 50257),
    "n_positions": ("block_size", 1024),
    "n_embd": ("n_embd", 768),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_inner": ("mlp_width", None),
    "activation_function": ("mlp", "gelu_tanh"),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
    "tie_word_embeddings": ("tie_embeddings", True),
}

# The GELU that a checkpoint's program computes where the file doesn't say.
NANOGPT_MLP = {"nanoGPT": "gelu_exact", "build-nanogpt": "gelu_tanh"}

_LLMC_HEADER = 1024
_LLMC_BLOCK = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj"


def expected(weights: Weights, form: str) -> Bytes:
    """What a file of GPT-2's own architecture should hold."""
    arrays = weights.arrays
    if form == "llmc":
        return {"the tensors": b"".join(_llmc(weights))}
    if form == "msgpack":
        return {name: array.tobytes() for name, array in _flax(weights).items()}
    transposed = form in ("torch", "nanogpt")
    if form in ("safetensors", "torch"):
        return {name: _laid(array, name, transposed).tobytes() for name, array in arrays.items()}
    held = {_with_head(name): _laid(array, name, transposed).tobytes() for name, array in arrays.items()}
    return held | ({"lm_head.weight": arrays["wte.weight"].tobytes()} if form == "nanogpt" else {})


def _with_head(name: str) -> str:
    """The name in a model that has a head beside a module `transformer`."""
    return name if name == "lm_head.weight" else f"transformer.{name}"


def _laid(array: np.ndarray, name: str, transposed: bool) -> np.ndarray:
    is_linear = array.ndim == 2 and not name.startswith(("wte", "wpe", "lm_head"))
    return np.ascontiguousarray(array.T if transposed and is_linear else array)


def _flax(weights: Weights) -> dict[str, np.ndarray]:
    leaves = {}
    for name, array in weights.arrays.items():
        module, kind = _with_head(name).rsplit(".", 1)
        if kind == "weight":
            kind = "embedding" if module.endswith(("wte", "wpe")) else "scale" if array.ndim == 1 else "kernel"
        # Conv1D's kernel is stored transposed, and so is a head, which is (vocabulary, width) here.
        array = array.T if kind == "kernel" else array
        leaves[f"{module.replace('.', '/')}/{kind}"] = np.ascontiguousarray(array)
    return leaves


def _llmc(weights: Weights) -> Iterator[bytes]:
    arrays, config = weights.arrays, weights.config
    missing = -config.vocab_size % 128
    yield np.pad(arrays["wte.weight"], ((0, missing), (0, 0))).tobytes()
    yield arrays["wpe.weight"].tobytes()
    for module in _LLMC_BLOCK.split():
        for kind in ("weight", "bias"):
            for layer in range(config.n_layer):
                yield _laid(arrays[f"h.{layer}.{module}.{kind}"], module, True).tobytes()
    yield arrays["ln_f.weight"].tobytes()
    yield arrays["ln_f.bias"].tobytes()


def _of_tensors(tensors: dict[str, torch.Tensor]) -> Bytes:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


# How each file is opened without this project's readers. The `jax` checkpoint is this project's alone.
READERS: dict[str, Callable[[Path], Bytes]] = {
    "safetensors": lambda path: _of_tensors(load_file(path)),
    "torch": lambda path: _of_tensors(load_file(path / "model.safetensors")),
    "hf": lambda path: _of_tensors(load_file(path / "model.safetensors")),
    "nanogpt": lambda path: _of_tensors(torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["model"]),
    "llmc": lambda path: {"the tensors": path.read_bytes()[_LLMC_HEADER:]},
    "msgpack": lambda path: {
        name: np.asarray(array).tobytes()
        for name, array in flatten_dict(
            flax.serialization.msgpack_restore((path / "flax_model.msgpack").read_bytes()), sep="/"
        ).items()
    },
}


# --- files as other programs leave them


def _torch_tensors(weights: Weights, form: str, *, views: bool = False, flat: bool = False) -> dict[str, torch.Tensor]:
    """`views`: linear weights as views of their transpose, as a conversion that transposes without a copy leaves
    them. `flat`: all tensors as views into one, as a model whose parameters were flattened for an optimizer leaves
    them."""
    if flat:
        whole = _torch_tensors(weights, form)
        every, sizes = torch.cat([tensor.reshape(-1) for tensor in whole.values()]), [t.numel() for t in whole.values()]
        pieces = every.split(sizes)
        return {name: piece.view(whole[name].shape) for name, piece in zip(whole, pieces, strict=True)}
    tensors = {}
    for name, array in weights.arrays.items():
        tensor = torch.from_numpy(_laid(array, name, form == "nanogpt").copy())
        is_linear = tensor.ndim == 2 and not name.startswith(("wte", "wpe", "lm_head"))
        tensors[_with_head(name)] = tensor.T.contiguous().T if views and is_linear else tensor
    return tensors


Change = Callable[[dict[str, torch.Tensor]], object]


def _another_head(tensors: dict[str, torch.Tensor]) -> None:
    head = tensors["transformer.wte.weight"].clone()
    head[3, 1] += 1
    tensors["lm_head.weight"] = head


# Tensors that contradict the configuration beside them: whatever is read from such a file, a part of it is lost.
CHANGES: dict[str, Change] = {
    "a tied model's head that isn't its embedding": _another_head,
    "a tensor that is missing": lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.bias"),
    "a tensor too many": lambda tensors: tensors.update({"transformer.h.0.attn.c_norm.weight": torch.ones(3)}),
    "a layer too many": lambda tensors: tensors.update(
        {n.replace(".0.", ".99."): t for n, t in tensors.items() if n.startswith("transformer.h.0.")}
    ),
    "a bias that is too short": lambda tensors: tensors.update(
        {"transformer.ln_f.bias": tensors["transformer.ln_f.bias"][:-1].clone()}
    ),
}


def build_nanogpt(weights: Weights, path: Path) -> None:
    """A checkpoint of build-nanogpt: its configuration is a pickled object of the script's own class."""

    class GPTConfig:
        pass

    GPTConfig.__module__, GPTConfig.__qualname__ = "__main__", "GPTConfig"
    config = GPTConfig()
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        setattr(config, name, getattr(weights.config, name))
    tensors = _torch_tensors(weights, "nanogpt")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    with mock.patch.object(sys.modules["__main__"], "GPTConfig", GPTConfig, create=True):
        torch.save({"model": tensors, "config": config, "step": 7, "val_loss": 3.0}, path)


def nanogpt(weights: Weights, path: Path, *, prefix: str = "", change: Change | None = None, **laid: bool) -> None:
    """A checkpoint of nanoGPT."""
    tensors = _torch_tensors(weights, "nanogpt", **laid)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    if change is not None:
        change(tensors)
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
    model = {prefix + name: tensor for name, tensor in tensors.items()}
    arguments = {name: getattr(weights.config, name) for name in names}
    torch.save({"model": model, "model_args": arguments, "iter_num": 7}, path)


def _bin(
    weights: Weights,
    path: Path,
    *,
    bare: bool = False,
    zipped: bool = True,
    change: Change | None = None,
    **laid: bool,
) -> None:
    """`bare`: of the model without a head, as the Hub's gpt2 is, with the mask that older versions kept."""
    tensors = _torch_tensors(weights, "hf", **laid)
    if change is not None:
        change(tensors)
    if bare:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones((1, 1, 4, 4), dtype=torch.bool).tril()
    torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def _sharded(weights: Weights, path: Path, *, suffix: str) -> None:
    tensors = _torch_tensors(weights, "hf")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    file_of = {name: f"{stem}-{1 + number % 2:05d}-of-00002.{suffix}" for number, name in enumerate(tensors)}
    for file in sorted(set(file_of.values())):
        part = {name: tensor for name, tensor in tensors.items() if file_of[name] == file}
        save_file(part, path / file) if suffix == "safetensors" else torch.save(part, path / file)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def _msgpack(weights: Weights, path: Path, *, chunk: int | None = None) -> None:
    """`chunk`: bytes of an array beyond which it is written in parts, flax's 1 GiB if left out."""
    tree = unflatten_dict(_flax(weights), sep="/")
    smaller = mock.patch.object(flax.serialization, "MAX_CHUNK_SIZE", chunk) if chunk else contextlib.nullcontext()
    with smaller:
        (path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))


def _in_folder(write: Callable[..., None], **options) -> Callable[[Weights, Path], None]:
    """A folder with config.json, as a conversion here would leave it, whose weights `write` writes."""

    def written(weights: Weights, path: Path) -> None:
        path.mkdir()
        hugging_face.write_description(weights, path)
        write(weights, path, **options)

    return written


# What is special about each file, and how it is written. Names sorted as text put the tenth part of an array, and layer
# 10, before the second.
WRITERS: dict[str, Callable[[Weights, Path], None]] = {
    "nanoGPT, compiled, by several processes": functools.partial(nanogpt, prefix="_orig_mod.module."),
    "nanoGPT, by several processes, compiled": functools.partial(nanogpt, prefix="module._orig_mod."),
    "nanoGPT, tensors that are views": functools.partial(nanogpt, views=True),
    "nanoGPT, all tensors in one": functools.partial(nanogpt, flat=True),
    "pytorch_model.bin, all tensors in one": _in_folder(_bin, flat=True),
    "pytorch_model.bin of 2019, all tensors in one": _in_folder(_bin, flat=True, zipped=False),
    "pytorch_model.bin of 2019, of a model without a head": _in_folder(_bin, bare=True, zipped=False),
    "pytorch_model.bin, tensors that are views": _in_folder(_bin, views=True),
    "pytorch_model.bin of 2019, tensors that are views": _in_folder(_bin, views=True, zipped=False),
    "pytorch_model.bin in two files": _in_folder(_sharded, suffix="bin"),
    "model.safetensors in two files": _in_folder(_sharded, suffix="safetensors"),
    "flax_model.msgpack": _in_folder(_msgpack),
    "flax_model.msgpack, arrays in twelve parts": _in_folder(_msgpack, chunk=400),
}

# The same of files that must be refused.
CONTRADICTING: dict[str, Callable[[Weights, Path], None]] = {
    f"{name}, {what}": write
    for what, change in CHANGES.items()
    for name, write in {
        "nanoGPT": functools.partial(nanogpt, change=change),
        "pytorch_model.bin": _in_folder(_bin, change=change),
    }.items()
}
