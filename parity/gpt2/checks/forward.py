"""Check `forward`: every intermediate value of both models, from the embeddings to the logits, in float64."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from gpt2_core.weights import Weights
from parity import diagnosis, places
from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject, relative_to_largest

# Rounding in float64 is 1e-16; sums over a few hundred terms and some tens of layers leave it below 1e-14. A wrong
# formula shows at 1e-9 and above, a float32 somewhere at 1e-7.
LIMIT = 1e-12


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    block_size = subject.weights.config.block_size
    shapes = ((1, 1), (1, block_size), (4, max(1, block_size // 2 + 1)))
    for batch, length in subject.at(shapes[1:2], shapes):
        tokens_BT = subject.tokens[: batch * length].reshape(batch, length)
        yield compare(ours, theirs, tokens_BT, f"{batch} x {length} tokens", subject.evidence)
    padded = _with_padded_vocabulary(subject.weights)
    tokens_BT = subject.tokens[:block_size].reshape(1, block_size)
    yield compare(JaxSide(padded), TorchSide(padded), tokens_BT, f"vocabulary padded to {padded.config.vocab_size}")


def compare(ours: JaxSide, theirs: TorchSide, tokens_BT: np.ndarray, case: str, evidence: dict | None = None) -> Result:
    """One forward pass, value by value."""
    a, b = ours.intermediates(tokens_BT), theirs.intermediates(tokens_BT)
    found = places.compare(a, b)
    # Capturing must not change what is computed.
    same = np.array_equal(a["logits"], ours.plain_logits(tokens_BT), equal_nan=True)
    # The same function as training compiles it.
    compiled = "logits as training compiles them"
    found += places.compare({compiled: ours.logits(tokens_BT)}, {compiled: b["logits"]})
    worst = places.worst_of(found)
    where = places.first_beyond(found, LIMIT)
    if not worst <= LIMIT:
        where += diagnosis.hint(found, LIMIT, a, b, theirs.weights, tokens_BT)
    if not same:
        worst, where = math.nan, f"capturing values changed the logits; with them captured: {where}"
    if evidence is not None:
        evidence["forward"] = [(p.name, p.difference) for p in found]
    return Result("forward", f"{len(found)} values, {case}", worst, LIMIT, where)


# A float32 pass rounds at 1e-7, which tens of layers bring to 1e-6 or 1e-5; another model is off by tenths.
LIMIT_FLOAT32 = 1e-4


def agreement_in_float32(weights: Weights) -> tuple[float, float]:
    """How far the logits of the two models are apart, over the largest, and the limit: a first look, in the memory that
    float32 takes. `check` is the proof."""
    config = weights.config
    tokens_BT = (np.arange(min(config.block_size, 32))[None] * 7919) % config.vocab_size
    theirs = TorchSide(weights, "float32").logits(tokens_BT)
    ours = JaxSide(weights, "float32").logits(tokens_BT)
    return relative_to_largest(ours, theirs), LIMIT_FLOAT32


def _with_padded_vocabulary(weights: Weights) -> Weights:
    """The same model with rows of zeros for ids that no tokenizer gives."""
    config = weights.config
    size = 64 * (config.vocab_size // 64 + 1)
    rows = {"wte.weight", "lm_head.weight"} & set(weights.arrays)
    padding = ((0, size - config.vocab_size), (0, 0))
    arrays = dict(weights.arrays) | {name: np.pad(weights.arrays[name], padding) for name in rows}
    return dataclasses.replace(weights, config=dataclasses.replace(config, vocab_size=size), arrays=arrays)
