"""The architecture of a GPT-2, the shapes of its parameters, and the counts that follow from them."""

import math
from dataclasses import dataclass
from typing import Literal

from gpt2_core.config.checks import refuse_unless, require_above_zero, require_positive

# A target of this id counts neither in the loss nor in its mean (PyTorch's ignore_index, with nanoGPT's value).
IGNORE_INDEX = -1

# The JAX model pads its vocabulary to a multiple of this: matrix units want it, and a mesh's tensor axis divides it.
VOCABULARY_MULTIPLE = 128

# Ten times as many as the deepest transformer published (Wang et al. 2022, "DeepNet"). Every layer has entries in the
# tables of names and shapes.
MOST_LAYERS = 10_000

# Sizes of the four published models (Radford et al. 2019, table 2).
PRESETS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


@dataclass(frozen=True)
class ModelConfig:
    """The architecture."""

    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Attention heads a block; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream, in features."""
    block_size: int = 1024
    """Longest context, in tokens: the number of learned positions and the length of a training sequence."""
    vocab_size: int = 50257
    """Number of token ids the model knows, at least the tokenizer's. Left out: the tokenizer's (gpt2 50257, bytes
    257)."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention weights and residual branches, 0 to below 1."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance (rmsnorm: the mean square) in every norm."""
    position: Literal["learned", "rope", "alibi"] = "learned"
    """How the model knows positions: learned position embeddings, rotary embeddings of queries and keys (rope), or
    attention scores that fall linearly with the distance between query and key (alibi)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_pairs: Literal["half", "interleaved"] = "half"
    """Which features of a head rotate together: i and i + head size / 2 (Hugging Face), or 2i and 2i + 1 (paper)."""
    mlp: Literal["gelu_tanh", "gelu_exact", "swiglu"] = "gelu_tanh"
    """The MLP: GELU in GPT-2's tanh form or exact by erf, or SwiGLU."""
    mlp_width: int | None = None
    """Hidden width of the MLP, in features. Left out: 4 n_embd; for swiglu, which has three matrices instead of two,
    8/3 n_embd rounded up to a multiple of 64."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """The norm before each branch and before the head; rmsnorm has a weight and no bias."""
    bias: bool = True
    """Whether linear layers and layer norms have a bias."""
    tie_embeddings: bool = True
    """Whether the head shares the token embedding's weight."""
    qk_norm: bool = False
    """Whether queries and keys are normalized by an RMS norm, separately for each head, before their product."""

    def __post_init__(self) -> None:
        require_positive("model.", self, "n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        refuse_unless(self.n_layer <= MOST_LAYERS, f"--model.n_layer {self.n_layer}: must be at most {MOST_LAYERS}")
        refuse_unless(
            self.n_embd % self.n_head == 0,
            f"--model.n_embd {self.n_embd}: not divisible by n_head {self.n_head}; "
            f"use a multiple of {self.n_head}, or a number of heads that divides {self.n_embd}",
        )
        refuse_unless(0.0 <= self.dropout < 1.0, f"--model.dropout {self.dropout}: must be at least 0 and below 1")
        require_above_zero("model.", self, "layer_norm_epsilon")
        if self.mlp_width is not None:
            require_positive("model.", self, "mlp_width")
        if self.position == "rope":
            refuse_unless(
                self.head_size % 2 == 0,
                f"--model.position rope: rotates pairs of features, and n_embd {self.n_embd} / n_head {self.n_head} = "
                f"{self.head_size} is odd; use another n_head or n_embd",
            )
            require_above_zero("model.", self, "rope_theta")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP, given or by default."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 64 * math.ceil(8 * self.n_embd / (3 * 64)) if self.mlp == "swiglu" else 4 * self.n_embd

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's canonical name and shape: GPT-2's own names, linear weights as (in, out)."""
        D, F, V, T = self.n_embd, self.mlp_size, self.vocab_size, self.block_size
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, D)}
        if self.position == "learned":
            shapes["wpe.weight"] = (T, D)
        for layer in range(self.n_layer):
            h = f"h.{layer}."
            shapes |= self._norm(h + "ln_1")
            shapes |= self._linear(h + "attn.c_attn", D, 3 * D)
            if self.qk_norm:
                shapes |= {h + "attn.q_norm.weight": (self.head_size,), h + "attn.k_norm.weight": (self.head_size,)}
            shapes |= self._linear(h + "attn.c_proj", D, D)
            shapes |= self._norm(h + "ln_2")
            shapes |= self._linear(h + "mlp.c_fc", D, F)
            if self.mlp == "swiglu":
                shapes |= self._linear(h + "mlp.c_gate", D, F)
            shapes |= self._linear(h + "mlp.c_proj", F, D)
        shapes |= self._norm("ln_f")
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (V, D)
        return shapes

    def _linear(self, name: str, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
        weight = {f"{name}.weight": (size_in, size_out)}
        return weight | {f"{name}.bias": (size_out,)} if self.bias else weight

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        weight = {f"{name}.weight": (self.n_embd,)}
        return weight | {f"{name}.bias": (self.n_embd,)} if self.bias and self.norm == "layernorm" else weight

    @property
    def parameter_count(self) -> int:
        """Number of parameters; a head that shares the token embedding's is not counted again."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    def training_flops_per_token(self, length: int) -> int:
        """Floating-point operations of a forward and backward pass for one token of a sequence of `length` T.

        6 N + 12 L T D (Chowdhery et al. 2022, "PaLM", appendix B), N being the parameters that multiply something: all
        but the position embeddings, and but the token embeddings where the head has a weight of its own. The attention
        term counts the whole T x T square, as that paper does, although a causal kernel computes half of it.
        """
        looked_up = ["wpe.weight"] if self.tie_embeddings else ["wpe.weight", "wte.weight"]
        shapes = self.parameter_shapes
        multiplying = self.parameter_count - sum(math.prod(shapes[name]) for name in looked_up if name in shapes)
        return 6 * multiplying + 12 * self.n_layer * length * self.n_embd
