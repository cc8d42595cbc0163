"""llm.c's model files: a header of 256 int32, then every tensor in a fixed order, each for all layers together.

The format is that of llm.c's train_gpt2.py (write_model) and train_gpt2.c (gpt2_build_from_checkpoint). Its CPU program
reads version 3 only.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2_convert.format import GPT2, GPT2_SIZES, Format, Holds
from gpt2_convert.source import Source
from gpt2_core.config import ModelConfig
from gpt2_core.config.io import model_from_dict
from gpt2_core.errors import UserError
from gpt2_core.files import writing
from gpt2_core.weights.canonical import DTYPES, LazyArrays, Weights
from gpt2_core.weights.layouts import Layout
from gpt2_core.weights.safetensors import lazy_tensor_at, write_values

LAYOUT = Layout(
    "llmc",
    out_in=True,
    vocabulary_multiple=128,
    only=GPT2 | GPT2_SIZES | {"mlp": ("gelu_tanh",), "bias": (True,)},
    dtypes=("float32", "bfloat16"),
)

MAGIC = 20240326
VERSIONS = {3: DTYPES["float32"], 5: DTYPES["bfloat16"]}
HEADER_BYTES = 1024

# Tensors of a block in the file's order; each is stored for all layers before the next one.
BLOCK_ORDER = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def detect(source: Source) -> bool:
    return source.head[:4] == MAGIC.to_bytes(4, "little")


def write(weights: Weights, path: Path) -> None:
    """Write `weights` as version 3 (float32) or 5 (bfloat16); raises UserError if they have more than one dtype."""
    config = weights.config
    tensors = LAYOUT.encode(weights.tensors, config)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise UserError(
            f"--to llmc: holds one dtype, and {weights.source} has {' and '.join(sorted(d.name for d in dtypes))}; "
            "add --dtype float32 or bfloat16"
        )
    version = next(v for v, dtype in VERSIONS.items() if dtype in dtypes)
    header = np.zeros(256, "<i4")
    header[:8] = (
        *(MAGIC, version, config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd),
        tensors["wte.weight"].shape[0],
    )
    with writing(path) as file:
        file.write(header.tobytes())
        write_values(file, (tensors[name] for name in _order(config)))


def read(source: Source) -> Weights:
    """The weights of a file; raises UserError if it isn't complete and of a known version."""
    path = source.path
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != MAGIC:
        raise UserError(f"{path}: not a model file of llm.c; those begin with the number {MAGIC} and are over 1 KiB")
    version, T, V, L, H, C, padded = map(int, header[1:8])
    if version not in VERSIONS:
        raise UserError(f"{path}: llm.c's version {version}; only 3 (float32) and 5 (bfloat16) can be read")
    dtype = VERSIONS[version]
    # Checked before the configuration is used: a damaged header may declare a billion layers.
    needed = HEADER_BYTES + dtype.itemsize * ((padded + T) * C + L * (12 * C * C + 13 * C) + 2 * C)
    if min(T, V, L, H, C) < 1 or padded != V + -V % LAYOUT.vocabulary_multiple or needed != size:
        raise UserError(
            f"{path}: its header (block {T}, vocabulary {V} in {padded} rows, {L} layers, {H} heads, width {C}) asks "
            f"for {needed:,} bytes, and the file has {size:,}"
        )
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V}
    config = model_from_dict(sizes, str(path))
    shapes = {name: placement.shape for name, placement in LAYOUT.placements(config).items()}
    found, offset = {}, HEADER_BYTES
    for name in _order(config):
        found[name] = lazy_tensor_at(path, offset, dtype, shapes[name])
        offset += found[name].nbytes
    return Weights(config, LazyArrays(LAYOUT.decode(found, config, str(path))), str(path))


def _order(config: ModelConfig) -> Iterator[str]:
    yield from ("wte.weight", "wpe.weight")
    for name in BLOCK_ORDER:
        yield from (f"h.{layer}.{name}" for layer in range(config.n_layer))
    yield from ("ln_f.weight", "ln_f.bias")


def _notes(weights: Weights) -> list[str]:
    if weights.tensors["wte.weight"].dtype != DTYPES["bfloat16"]:
        return []
    return ["this is version 5, for llm.c's CUDA program; its CPU program reads version 3: --dtype float32"]


FORMAT = Format(
    layout=LAYOUT,
    holds=Holds(0),
    described="a model file of llm.c (.bin)",
    help="a model file of llm.c",
    detect=detect,
    read=read,
    write=write,
    notes=_notes,
)
