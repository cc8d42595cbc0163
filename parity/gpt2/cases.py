"""The weights and the text that are compared when the user brings none of their own."""

import itertools

import numpy as np

from gpt2_core.config import DataConfig, ModelConfig
from gpt2_core.corpora import get_corpus
from gpt2_core.errors import UserError
from gpt2_core.tokenizer import get_tokenizer
from gpt2_core.weights import Weights

SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=257)


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
    vocab_size = weights.config.vocab_size
    name = weights.tokenizer or ("gpt2" if vocab_size >= 50257 else "bytes")
    tokenizer = get_tokenizer(name)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{weights.source}: a vocabulary of {vocab_size} is too small for the text's tokenizer {name} "
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
