"""Hugging Face's folders: config.json, and the weights as safetensors or PyTorch files, whole or in shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_convert.format import GPT2, MASKS, Format, Holds
from gpt2_convert.source import Source
from gpt2_core.config import ModelConfig
from gpt2_core.config.io import model_from_dict
from gpt2_core.data.tokenizer import get_tokenizer, is_genuine, local_file
from gpt2_core.errors import UserError
from gpt2_core.weights import LazyArrays, LazyTensor, Weights
from gpt2_core.weights.layouts import Layout
from gpt2_core.weights.safetensors import write_tensors

LAYOUT = Layout("hf", prefix="transformer.", buffers=MASKS, only=GPT2 | {"bias": (True,)})

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
# The files that the weights may be in, in order of preference.
SOURCES = (_WEIGHTS, f"{_WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_METADATA = "gpt2_jax.tokenizer"

# Hugging Face's names of the activations, and this project's name of each.
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


def detect(source: Source) -> bool:
    return source.has(CONFIG) and (source.path.is_dir() or source.tensors is not None)


def read(source: Source) -> Weights:
    """The weights of a folder, or of the folder that a file lies in."""
    config = read_config(source)
    file = weights_file(source, SOURCES)
    found = open_whole_or_shards(file, (".safetensors", ".bin"), _open)
    arrays = LAYOUT.decode(prefixed(found, LAYOUT.prefix, "lm_head.weight", file.path), config, str(file.path))
    written_here = file.safetensors[1].get(TOKENIZER_METADATA) if file.is_safetensors else None
    return Weights(config, LazyArrays(arrays), str(source.folder), written_here or read_tokenizer(source))


def write(weights: Weights, folder: Path) -> None:
    """A folder that transformers' GPT2LMHeadModel.from_pretrained loads."""
    folder.mkdir()
    metadata = {"format": "pt", TOKENIZER_METADATA: weights.tokenizer or ""}
    write_tensors(folder / _WEIGHTS, LAYOUT.encode(weights.tensors, weights.config), metadata)
    write_description(weights, folder)


def read_config(source: Source) -> ModelConfig:
    """The architecture that config.json describes; raises UserError if there is none, or it isn't a GPT-2's."""
    file = source.file(CONFIG)
    if not file.path.is_file():
        raise UserError(f"{source.path}: not a Hugging Face model folder; {source.folder} has no {CONFIG}")
    return _config(file.json, file.path)


def write_description(weights: Weights, folder: Path, **more: Any) -> None:
    """The other files of the folder: config.json, with `more` in it, and GPT-2's tokenizer for weights that have it."""
    config = weights.config
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
        "dtype": weights.tensors["wte.weight"].dtype.name,
        **more,
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
    # This project has one dropout rate. If the file's three differ, 0 is taken: dropout matters in training only.
    settings |= {"mlp": _ACTIVATIONS[activation], "dropout": float(dropouts.pop()) if len(dropouts) == 1 else 0.0}
    return model_from_dict(settings, str(path))


def weights_file(source: Source, names: tuple[str, ...]) -> Source:
    """The file itself, or the first of `names` that a folder has; raises UserError if it has none."""
    if source.path.is_file():
        return source
    for name in names:
        if source.has(name):
            return source.file(name)
    raise UserError(f"{source.folder}: has {CONFIG} and no weights; expected {' or '.join(names)}")


def open_whole_or_shards(
    file: Source, suffixes: tuple[str, ...], open_file: Callable[[Source], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    """The tensors of a file of weights, or of all the files that an index names, each opened by `open_file`."""
    return _open_shards(file, suffixes, open_file) if file.path.name.endswith(".index.json") else open_file(file)


def _open(file: Source) -> dict[str, LazyTensor]:
    if file.tensors is None:
        raise UserError(f"{file.path}: not a safetensors file or a state dict (tensors by name)")
    return file.tensors


def _open_shards(
    index: Source, suffixes: tuple[str, ...], open_file: Callable[[Source], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    path, file_of = index.path, index.json.get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UserError(f"{path}: has no 'weight_map' from tensors to files")
    found: dict[str, LazyTensor] = {}
    for file in sorted(set(file_of.values())):
        if Path(file).name != file or not file.endswith(suffixes):
            raise UserError(f"{path}: names {file!r:.80}; expected a file of weights in the same folder")
        if not index.has(file):
            raise UserError(f"{path}: names {file}, which is missing; copy it into the same folder")
        for name, tensor in open_file(index.file(file)).items():
            if name in found:
                raise UserError(f"{path.parent / file}: {name} is also in another shard")
            if file_of.get(name) != file:
                raise UserError(f"{path.parent / file}: holds {name}, which {path.name} says is in {file_of.get(name)}")
            found[name] = tensor
    if missing := [name for name in file_of if name not in found]:
        raise UserError(f"{path}: {missing[0]} isn't in {file_of[missing[0]]}")
    return found


def prefixed(found: dict[str, LazyTensor], prefix: str, head: str, path: Path) -> dict[str, LazyTensor]:
    """The tensors by the names of the model with a head; those of the bare model lack the prefix."""
    named: dict[str, LazyTensor] = {}
    for name, tensor in found.items():
        full = name if name.startswith(prefix) or name == head else prefix + name
        if full in named:
            raise UserError(f"{path}: {full} appears twice, with and without '{prefix}'")
        named[full] = tensor
    return named


def read_tokenizer(source: Source) -> str | None:
    """The name of the tokenizer whose files lie in the folder, if they are GPT-2's own."""
    merges = source.folder / _TOKENIZER_FILES["vocab.bpe"]
    if merges.is_file():
        return "gpt2" if is_genuine("gpt2", "vocab.bpe", merges.read_bytes()) else None
    if source.has("tokenizer.json") and (ours := local_file("gpt2", "vocab.bpe")):
        model = source.file("tokenizer.json").json.get("model")
        merges = model.get("merges") if isinstance(model, dict) else None
        pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges or []]
        return "gpt2" if pairs == ours.decode().splitlines()[1:] else None
    return None


FORMAT = Format(
    layout=LAYOUT,
    holds=Holds.EXACT_GELU | Holds.SIZES | Holds.FLOAT64,
    described="a Hugging Face GPT-2 folder (config.json)",
    help="a folder for transformers' GPT2LMHeadModel",
    detect=detect,
    read=read,
    write=write,
    owns=owns,
    hub=(("*.safetensors", "*.safetensors.index.json"), ("pytorch_model*.bin", "pytorch_model.bin.index.json")),
)
