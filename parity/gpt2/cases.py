"""What the checks compare on: weights, the user's or random ones, and real text."""

import dataclasses
import itertools
from typing import Any, Literal

import numpy as np

from gpt2_core.config import DataConfig, ModelConfig
from gpt2_core.data.corpora import get_corpus
from gpt2_core.data.tokenizer import Tokenizer, get_tokenizer
from gpt2_core.errors import UserError
from gpt2_core.weights import Weights
from parity.engine.evidence import Evidence

Level = Literal["quick", "prove", "default", "full"]

SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=257)
# A first and a last layer: each layer more is compiled in a dozen programs.
SMALL_QUICK = dataclasses.replace(SMALL, n_layer=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compared: one set of weights in both implementations, on real text."""

    weights: Weights
    tokens: np.ndarray
    """Ids of the text, shape (T,)."""
    level: Level = "default"
    steps: int | None = None
    """Length of the loss curve; None: what the level says."""
    seed: int = 0
    evidence: dict[str, Evidence] = dataclasses.field(default_factory=dict)
    """What the checks leave for the report to draw."""
    part: str | None = None
    """The one part of a check that runs, by the check's own name for it; None: every part."""

    def runs(self, part: str) -> bool:
        return self.part in (None, part)

    def at(self, quick: Any, default: Any, full: Any | None = None, prove: Any | None = None) -> Any:
        """The one of these that belongs to the level. Left out: `full` does what `default` does, `prove` what `quick`
        does."""
        full, prove = default if full is None else full, quick if prove is None else prove
        return {"quick": quick, "prove": prove, "default": default, "full": full}[self.level]


def random_weights(config: ModelConfig, seed: int = 0, dtype: type = np.float32) -> Weights:
    """Weights in which every tensor matters.

    GPT-2's own initialisation has zero biases and unit layer norms, and its signals are so small that attention is
    nearly uniform: a port that forgot a bias or the attention scale would agree with it. Here linear weights have the
    size that keeps a signal's variance, and biases and layer norms are random. In float64 no value is one that float32
    has too, so that a rounding on the way shows.
    """
    generator = np.random.default_rng(seed)
    arrays = {}
    for name, shape in config.parameter_shapes.items():
        values = generator.standard_normal(shape)
        if name.endswith(".bias"):
            values *= 0.1
        elif "ln_" in name or "_norm" in name:
            values = 1.0 + 0.1 * values
        elif name in ("wte.weight", "wpe.weight", "lm_head.weight"):
            values *= 0.1
        else:
            values /= np.sqrt(shape[0])
        arrays[name] = values.astype(dtype)
    return Weights(config, arrays, f"random weights (seed {seed})", "bytes")


def real_text(weights: Weights, tokens: int = 200_000) -> np.ndarray:
    """About `tokens` ids of Python's standard library, in the tokenizer that the weights were trained with."""
    tokenizer, vocab_size = tokenizer_of(weights), weights.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{weights.source}: a vocabulary of {vocab_size} is too small for the text's tokenizer {tokenizer.name} "
            f"({tokenizer.vocab_size} ids)"
        )
    needed = max(tokens, 4 * weights.config.block_size)
    pieces = (piece for document in get_corpus(DataConfig(corpus="stdlib")).documents() for piece in document.pieces)
    counted = itertools.accumulate(
        map(tokenizer.encode, pieces), lambda total, ids: (total[0] + len(ids), ids), initial=(0, None)
    )
    parts = []
    for count, ids in counted:
        if ids is not None:
            parts.append(ids)
        if count >= needed:
            break
    return np.concatenate(parts)[:needed]


def tokenizer_of(weights: Weights) -> Tokenizer:
    """The one that the weights were trained with; where they don't say, the one that fits their vocabulary."""
    return get_tokenizer(weights.tokenizer or ("gpt2" if weights.config.vocab_size >= 50257 else "bytes"))
