"""`Format`: what a weight format's module exports and the registry lists."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt2_convert.source import Source
from gpt2_core.weights import Weights
from gpt2_core.weights.layouts import Layout


class Holds(enum.Flag):
    """What a format can hold beyond a plain GPT-2 in float32 or bfloat16. Declared independently of `Layout.only`,
    which enforces it: parity's `weights` check and the tests compare the two."""

    VARIANTS = enum.auto()
    """RoPE, ALiBi, RMS norm, SwiGLU, query and key norms."""
    EXACT_GELU = enum.auto()
    NO_BIASES = enum.auto()
    SIZES = enum.auto()
    """An untied head, another MLP width or another epsilon than GPT-2's."""
    FLOAT64 = enum.auto()


@dataclass(frozen=True)
class Format:
    """A weight format: how it is recognized, read and written, and described to users."""

    layout: Layout
    """Names and shapes of its tensors; `layout.format` is the name that users type."""
    holds: Holds
    described: str
    """The format as a source, with its article, for help and errors."""
    help: str
    """What `--to` writes."""
    detect: Callable[[Source], bool]
    """Whether a file or folder has this format; raises UserError if it has and is damaged."""
    read: Callable[..., Weights]
    """The weights of a Source, each tensor read when it is asked for; also takes `mlp` if the format has `assumes`."""
    write: Callable[[Weights, Path], object]
    owns: Callable[[str], bool] | None = None
    """For a format that is a folder: whether a file of this name belongs to it. None: the format is one file."""
    suffix: str = ""
    """How the name of a written file must end."""
    notes: Callable[[Weights], list[str]] = lambda weights: []
    """What the user must know about the program that reads the written weights."""
    assumes: str = ""
    """The GELU that is assumed for files that don't record it, for the help of `--mlp`. Empty: they record it."""
    hub: tuple[tuple[str, ...], ...] = ()
    """Patterns of the weight files on the Hugging Face Hub, in order of preference; one set of files is enough."""

    @property
    def name(self) -> str:
        return self.layout.format

    @property
    def is_folder(self) -> bool:
        return self.owns is not None


# What formats of GPT-2's own architecture can hold: settings, and their only values.
GPT2 = {
    "position": ("learned",),
    "norm": ("layernorm",),
    "mlp": ("gelu_tanh", "gelu_exact"),
    "qk_norm": (False,),
}
GPT2_SIZES = {"mlp_width": (None,), "layer_norm_epsilon": (1e-5,), "tie_embeddings": (True,)}
# The causal mask, which old versions of transformers and nanoGPT saved among the weights.
MASKS = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
