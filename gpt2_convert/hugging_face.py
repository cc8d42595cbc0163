"""Hugging Face's folders: config.json, and the weights as safetensors or as PyTorch's own files, whole or in shards."""

import json
from pathlib import Path
from typing import Any

from gpt2_core.config import ModelConfig, model_from_dict
from gpt2_core.errors import UserError
from gpt2_core.tokenizer import get_tokenizer, is_genuine, local_file
from gpt2_core.weights import Stored, StoredArrays, Weights
from gpt2_core.weights.layouts import HUGGING_FACE
from gpt2_core.weights.safetensors import json_object, open_tensors, write_tensors

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_SOURCES = (_WEIGHTS, f"{_WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER_METADATA = "gpt2_jax.tokenizer"

# Hugging Face's names of the activations, and which of ours each one computes.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_exact"}
# GPT2Config's defaults, for what a config.json leaves out: the setting here, its name there, its default.
_SETTINGS = {
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "block_size": ("n_positions", 1024),
    "vocab_size": ("vocab_size", 50257),
    "mlp_width": ("n_inner", None),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
    "tie_embeddings": ("tie_word_embeddings", True),
}
# Variants that Hugging Face's GPT-2 knows and this project doesn't, and the value that means plain GPT-2.
_PLAIN = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

# Files of GPT-2's tokenizer: their names here and there.
_TOKENIZER_FILES = {"vocab.bpe": "merges.txt", "encoder.json": "vocab.json"}


def read(path: Path) -> Weights:
    """The weights of a folder, or of the folder that a file lies in, read as they are asked for."""
    folder = path if path.is_dir() else path.parent
    config_path = folder / CONFIG
    if not config_path.is_file():
        raise UserError(f"{path}: not a Hugging Face model folder; {folder} has no {CONFIG}")
    config = _config(json_object(config_path.read_bytes(), str(config_path)), config_path)
    source = path if path.is_file() else _source(folder)
    opened = _open_shards(folder, source) if source.name.endswith(".index.json") else _open(source)
    found = _prefixed(opened, source)
    arrays = HUGGING_FACE.decode(found, config, str(source))
    return Weights(config, StoredArrays(arrays), str(folder), _tokenizer(folder, source))


def write(weights: Weights, folder: Path) -> None:
    """A folder that transformers' GPT2LMHeadModel.from_pretrained loads."""
    folder.mkdir()
    config = weights.config
    metadata = {"format": "pt", _TOKENIZER_METADATA: weights.tokenizer or ""}
    write_tensors(folder / _WEIGHTS, HUGGING_FACE.encode(weights.stored, config), metadata)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if weights.tokenizer is not None:
        ends = dict.fromkeys(ends, get_tokenizer(weights.tokenizer).end_of_text)
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.mlp)
    described = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _SETTINGS.items()},
        "activation_function": activation,
        **dict.fromkeys(_DROPOUTS, config.dropout),
        **ends,
        "dtype": weights.stored["wte.weight"].dtype.name,
    }
    _write_json(folder / CONFIG, described)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
    if weights.tokenizer == "gpt2":
        files = {theirs: local_file("gpt2", ours) for ours, theirs in _TOKENIZER_FILES.items()}
        if None not in files.values():
            for name, content in files.items():
                (folder / name).write_bytes(content)
            described = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config.block_size}
            _write_json(folder / "tokenizer_config.json", described)


def owns(name: str) -> bool:
    """Whether a folder of this format has a file of this name."""
    return name.endswith((".safetensors", ".json", ".bin")) or name == "merges.txt"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _config(values: dict[str, Any], path: Path) -> ModelConfig:
    if values.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type {values.get('model_type')!r:.80}; expected gpt2")
    for name, plain in _PLAIN.items():
        if values.get(name, plain) != plain:
            raise UserError(f"{path}: {name} {values[name]!r:.80} is a variant of GPT-2 that this project doesn't have")
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(
            f"{path}: activation_function {activation!r:.80} is not one of {', '.join(_ACTIVATIONS)}, which this "
            "project has"
        )
    dropouts = {values.get(name, 0.1) for name in _DROPOUTS if isinstance(values.get(name, 0.1), int | float)}
    settings = {ours: values.get(theirs, default) for ours, (theirs, default) in _SETTINGS.items()}
    # The model has one rate; where theirs are three, none of them is it. Dropout takes no part in what weights mean.
    settings |= {"mlp": _ACTIVATIONS[activation], "dropout": float(dropouts.pop()) if len(dropouts) == 1 else 0.0}
    return model_from_dict(settings, str(path))


def _source(folder: Path) -> Path:
    for name in _SOURCES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: has {CONFIG} and no weights; expected {' or '.join(_SOURCES)}")


def _open(path: Path) -> dict[str, Stored]:
    if path.suffix == ".safetensors":
        return open_tensors(path)[0]
    from gpt2_convert.torch_files import open_torch_file

    contents = open_torch_file(path)
    if not isinstance(contents, dict) or not all(isinstance(value, Stored) for value in contents.values()):
        raise UserError(f"{path}: not a state dict, names with a tensor each")
    return {str(name): tensor for name, tensor in contents.items()}


def _open_shards(folder: Path, index: Path) -> dict[str, Stored]:
    places = json_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index}: has no «weight_map» from tensors to files")
    found: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith((".safetensors", ".bin")):
            raise UserError(f"{index}: names {file!r:.80}; expected a file of weights in the same folder")
        if not (folder / file).is_file():
            raise UserError(f"{index}: names {file}, which isn't there")
        tensors = _open(folder / file)
        for name, tensor in tensors.items():
            if name in found:
                raise UserError(f"{folder / file}: {name} is in another shard too")
            if places.get(name) != file:
                raise UserError(f"{folder / file}: holds {name}, which {index.name} says is in {places.get(name)}")
            found[name] = tensor
    if missing := [name for name in places if name not in found]:
        raise UserError(f"{index}: {missing[0]} isn't in {places[missing[0]]}")
    return found


def _prefixed(found: dict[str, Stored], source: Path) -> dict[str, Stored]:
    """Names as GPT2LMHeadModel has them; a bare GPT2Model's lack the prefix."""
    prefix = HUGGING_FACE.prefix
    named: dict[str, Stored] = {}
    for name, tensor in found.items():
        full = name if name.startswith(prefix) or name == "lm_head.weight" else prefix + name
        if full in named:
            raise UserError(f"{source}: {full} is there twice, with and without «{prefix}»")
        named[full] = tensor
    return named


def _tokenizer(folder: Path, source: Path) -> str | None:
    """The tokenizer's name, if it was written here or if the folder has GPT-2's own."""
    if source.suffix == ".safetensors" and (name := open_tensors(source)[1].get(_TOKENIZER_METADATA)):
        return name
    merges = folder / _TOKENIZER_FILES["vocab.bpe"]
    if merges.is_file():
        return "gpt2" if is_genuine("gpt2", "vocab.bpe", merges.read_bytes()) else None
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file() and (ours := local_file("gpt2", "vocab.bpe")):
        model = json_object(tokenizer.read_bytes(), str(tokenizer)).get("model")
        merges = model.get("merges") if isinstance(model, dict) else None
        pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges or []]
        return "gpt2" if pairs == ours.decode().splitlines()[1:] else None
    return None
