"""Where a format puts each tensor: names, orientation and padding; the canonical form's layout and both trainers'.

C is n_embd; a linear layer maps `in` features to `out`. The layouts of other programs' formats are in gpt2_convert.

| format | linear weights | `c_attn` | vocabulary |
|---|---|---|---|
| canonical (`safetensors`) | (in, out), as OpenAI's Conv1D | q, k, v side by side | as it is |
| `jax` | (in, out) | (C, 3, C) | zero rows to a multiple of 128 |
| `torch` | (out, in), as nn.Linear | q, k, v side by side | as it is |

`jax` has a separate axis for q, k and v, so that a mesh's tensor axis splits heads and not the three side by side; the
zero rows make the vocabulary divisible by that axis.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpt2_core.config import VOCABULARY_MULTIPLE, ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.weights.canonical import LazyTensor, check_tensors

Change = Callable[[np.ndarray], np.ndarray]

_LINEAR = re.compile(r"\.(c_attn|c_proj|c_fc|c_gate)\.weight$")
_PER_TOKEN = ("wte.weight", "lm_head.weight")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a format stores the canonical tensors, and which architectures it can hold."""

    format: str
    prefix: str = ""
    """Before every name but the head's."""
    out_in: bool = False
    """Whether linear weights have the shape (out, in)."""
    split_qkv: bool = False
    """Whether c_attn has an axis of its own for q, k and v."""
    copies_head: bool = False
    """Whether a tied head is stored a second time, as lm_head.weight."""
    vocabulary_multiple: int = 1
    """Rows of zeros fill the vocabulary up to a multiple of this."""
    buffers: str = r"(?!)"
    """Pattern of further names that a file may hold, which are ignored: older versions stored them, nothing needs
    them."""
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Settings of the architecture, and the only values that the format can hold."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float64")

    def placements(self, config: ModelConfig) -> dict[str, "Placement"]:
        """Where each canonical tensor goes."""
        return {name: self.placement(name, shape) for name, shape in config.parameter_shapes.items()}

    def placement(self, name: str, shape: tuple[int, ...]) -> "Placement":
        """Where the canonical tensor of this name and shape goes; a format with other names overrides this."""
        stored_as = name if name == "lm_head.weight" else self.prefix + name
        if self.out_in and _LINEAR.search(name):
            return Placement(stored_as, shape[::-1], np.transpose, np.transpose)
        if self.split_qkv and ".c_attn." in name:
            apart = (*shape[:-1], 3, shape[-1] // 3)
            return Placement(stored_as, apart, lambda a: a.reshape(apart), lambda a: a.reshape(shape))
        if self.vocabulary_multiple > 1 and name in _PER_TOKEN:
            missing = -shape[0] % self.vocabulary_multiple
            return Placement(
                stored_as,
                (shape[0] + missing, shape[1]),
                lambda a: np.pad(a, ((0, missing), (0, 0))),
                lambda a: a[: shape[0]],
            )
        return Placement(stored_as, shape, _unchanged, _unchanged)

    def encode(self, tensors: Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
        """Canonical tensors as this format stores them, by its names; raises UserError if it can't hold them."""
        self.check_holds(config)
        encoded = {}
        for name, placement in self.placements(config).items():
            encoded[placement.name] = tensors[name].map(placement.shape, placement.encode)
        if self.copies_head and config.tie_embeddings:
            encoded["lm_head.weight"] = encoded[self.prefix + "wte.weight"]
        for name, tensor in encoded.items():
            if tensor.dtype.name not in self.dtypes:
                raise UserError(
                    f"--to {self.format}: can't hold {name} in {tensor.dtype}; "
                    f"add --dtype {' or '.join(d for d in self.dtypes if d in ('float32', 'bfloat16'))}"
                )
        return encoded

    def decode(self, found: Mapping[str, LazyTensor], config: ModelConfig, source: str) -> dict[str, LazyTensor]:
        """Canonical tensors from what a file of this format holds; raises UserError, in the file's own names."""
        if config.n_layer > len(found):  # refused before a damaged header's number of layers is believed
            raise UserError(f"{source}: declares {config.n_layer} layers but has {len(found)} tensors")
        placements = self.placements(config)
        kept = {name: tensor for name, tensor in found.items() if not re.fullmatch(self.buffers, name)}
        head, embedding = kept.get("lm_head.weight"), kept.get(self.prefix + "wte.weight")
        if config.tie_embeddings and head is not None and embedding is not None:
            if not _same(head, embedding):
                raise UserError(
                    f"{source}: lm_head.weight differs from {self.prefix}wte.weight, though the configuration "
                    "ties the head to the embedding"
                )
            del kept["lm_head.weight"]
        check_tensors(kept, {placement.name: placement.shape for placement in placements.values()}, source)
        shapes = config.parameter_shapes
        return {
            name: kept[placement.name].map(shapes[name], placement.decode) for name, placement in placements.items()
        }

    def check_holds(self, config: ModelConfig) -> None:
        """Raise UserError naming the first setting of the architecture that the format can't hold."""
        for option, values in self.only.items():
            value = getattr(config, option)
            if value not in values and not (option == "mlp_width" and value == 4 * config.n_embd):
                allowed = " or ".join(_in_words(option, v) for v in values)
                raise UserError(
                    f"--to {self.format}: can't hold {_in_words(option, value)}; it can hold only {allowed}"
                )


@dataclasses.dataclass(frozen=True)
class Placement:
    """A tensor's name and shape in a format, and the way there and back."""

    name: str
    shape: tuple[int, ...]
    encode: Change
    decode: Change


CANONICAL = Layout("safetensors")
JAX = Layout("jax", split_qkv=True, vocabulary_multiple=VOCABULARY_MULTIPLE)
TORCH = Layout("torch", out_in=True)


def _unchanged(array: np.ndarray) -> np.ndarray:
    return array


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a is b or np.array_equal(*(np.ascontiguousarray(t.read()).view(np.uint8) for t in (a, b)))


def _in_words(option: str, value: Any) -> str:
    if option == "mlp_width":
        return f"mlp_width {value or '4 n_embd'}"
    return f"{option} {str(value).lower() if isinstance(value, bool) else value}"
