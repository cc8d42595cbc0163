"""Checkpoints of nanoGPT (`model_args`) and build-nanogpt (a pickled GPTConfig), both by Andrej Karpathy.

nanoGPT's model computes the exact GELU, build-nanogpt's the tanh form of GPT-2; neither checkpoint records which.
Checkpoints written here do, under an additional key that both programs ignore.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_convert.format import GPT2, GPT2_SIZES, MASKS, Format, Holds
from gpt2_convert.source import Source
from gpt2_core.config.io import model_from_dict
from gpt2_core.errors import UserError
from gpt2_core.weights import LazyArrays, LazyTensor, Weights
from gpt2_core.weights.layouts import Layout

LAYOUT = Layout("nanogpt", prefix="transformer.", out_in=True, copies_head=True, buffers=MASKS, only=GPT2 | GPT2_SIZES)

_OURS = "gpt2_jax"
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_ARGUMENTS = (*_SIZES, "bias", "dropout")
# torch.compile and DistributedDataParallel each put one before every name.
_WRAPPERS = ("_orig_mod.", "module.")


def detect(source: Source) -> bool:
    contents = source.torch if source.is_torch else None
    return isinstance(contents, dict) and "model" in contents and ("model_args" in contents or "config" in contents)


def read(source: Source, mlp: str | None = None) -> Weights:
    """The weights of a checkpoint. `mlp` is gelu_exact or gelu_tanh; left out: what the file records, else what the
    program that wrote it computes, which `notes` then says."""
    path, contents = source.path, source.torch
    if not isinstance(contents, dict) or not isinstance(contents.get("model"), dict):
        raise UserError(f"{path}: not a checkpoint of nanoGPT, which has the weights under 'model'")
    arguments, program = _arguments(contents, path)
    ours = contents.get(_OURS)
    ours = ours if isinstance(ours, dict) else {}
    said = mlp or ours.get("mlp")
    notes = ()
    if said is None:
        said = "gelu_exact" if program == "nanoGPT" else "gelu_tanh"
        other = "gelu_tanh" if said == "gelu_exact" else "gelu_exact"
        notes = (
            f"{path}: read as a model with mlp {said}, which is what {program}'s model computes; the file doesn't say. "
            f"If it was trained with the other GELU, convert it with --mlp {other}",
        )
    config = model_from_dict(arguments | {"mlp": said}, str(path))
    found = _unwrapped(contents["model"], path)
    tokenizer = ours.get("tokenizer")
    return Weights(
        config,
        LazyArrays(LAYOUT.decode(found, config, str(path))),
        str(path),
        tokenizer if isinstance(tokenizer, str) else None,
        notes,
    )


def write(weights: Weights, path: Path) -> None:
    """A checkpoint that nanoGPT's sample.py loads; torch.save needs all weights in memory."""
    import torch

    from gpt2_core.files import writing
    from gpt2_torch.weights import to_tensor

    config = weights.config
    tensors: dict[str, Any] = {}
    stored = LAYOUT.encode(weights.tensors, config)
    for name, tensor in stored.items():
        if name != "lm_head.weight":
            tensors[name] = to_tensor(tensor.read())
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # one storage, as nanoGPT itself saves it
    contents = {
        "model": tensors,
        "model_args": {name: getattr(config, name) for name in _ARGUMENTS},
        "iter_num": 0,
        _OURS: {"mlp": config.mlp, "tokenizer": weights.tokenizer},
    }
    with writing(path) as file:
        torch.save(contents, file)


def _arguments(contents: dict, path: Path) -> tuple[dict[str, Any], str]:
    """The architecture that a checkpoint records, and the program that wrote it."""
    if isinstance(contents.get("model_args"), dict):
        given, program = contents["model_args"], "nanoGPT"
    elif type(contents.get("config")).__name__ == "GPTConfig":  # the one class that is unpickled
        given, program = vars(contents["config"]), "build-nanogpt"
    else:
        raise UserError(f"{path}: neither nanoGPT's 'model_args' nor build-nanogpt's 'config' is in it")
    if unknown := [str(name) for name in given if name not in _ARGUMENTS]:
        raise UserError(f"{path}: its model has {', '.join(unknown[:3])}, which nanoGPT's models don't")
    if missing := [name for name in _SIZES if name not in given]:
        raise UserError(f"{path}: doesn't record its model's {', '.join(missing)}")
    return given, program


def _unwrapped(model: Mapping[str, Any], path: Path) -> dict[str, LazyTensor]:
    found: dict[str, LazyTensor] = {}
    for name, tensor in model.items():
        if not isinstance(tensor, LazyTensor):
            raise UserError(f"{path}: {name!s:.80} isn't a tensor")
        bare = str(name)
        while prefix := next((p for p in _WRAPPERS if bare.startswith(p)), None):
            bare = bare.removeprefix(prefix)
        if bare in found:
            raise UserError(f"{path}: {bare} appears twice, once as {name}")
        found[bare] = tensor
    return found


def _notes(weights: Weights) -> list[str]:
    if weights.config.mlp != "gelu_tanh":
        return []
    return [
        "nanoGPT's model.py computes the exact GELU, and these weights need the tanh form, as in build-nanogpt: change "
        "it to nn.GELU(approximate='tanh'), or its logits will differ by about a thousandth"
    ]


FORMAT = Format(
    layout=LAYOUT,
    holds=Holds.EXACT_GELU | Holds.NO_BIASES | Holds.FLOAT64,
    described="a checkpoint of nanoGPT (ckpt.pt)",
    help="a ckpt.pt",
    detect=detect,
    read=read,
    write=write,
    notes=_notes,
    assumes="gelu_exact for nanoGPT, gelu_tanh for build-nanogpt, which is what their programs compute",
)
