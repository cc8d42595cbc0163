"""Check `forward`: every intermediate value of both models, from the embeddings to the logits, in float64."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from gpt2_core.weights import Weights
from parity.engine import divergence
from parity.engine.adapter import lacking
from parity.engine.evidence import Depth
from parity.engine.results import Result, Skipped, relative_to_largest
from parity.gpt2 import diagnosis, limits
from parity.gpt2.adapters import both
from parity.gpt2.adapters.protocol import INTERMEDIATES, PLAIN_LOGITS, Adapter
from parity.gpt2.cases import Case
from parity.gpt2.naming import first_beyond


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    if skipped := lacking("forward", "what is between", (candidate, INTERMEDIATES), (reference, INTERMEDIATES)):
        yield skipped
    block_size = case.weights.config.block_size
    shapes = ((1, 1), (1, block_size), (4, max(1, block_size // 2 + 1)))
    for batch, length in case.at(shapes[1:2], shapes):
        tokens_BT = case.tokens[: batch * length].reshape(batch, length)
        yield compare(candidate, reference, tokens_BT, f"{batch} x {length} tokens", case.evidence)
    padded = _with_padded_vocabulary(case.weights)
    tokens_BT = case.tokens[:block_size].reshape(1, block_size)
    both_padded = candidate.make(padded), reference.make(padded)
    yield compare(*both_padded, tokens_BT, f"vocabulary padded to {padded.config.vocab_size}", watched=False)


def compare(
    candidate: Adapter,
    reference: Adapter,
    tokens_BT: np.ndarray,
    title: str,
    evidence: dict | None = None,
    *,
    watched: bool = True,
) -> Result:
    """One forward pass, value by value; of the logits alone where an adapter shows nothing else.

    What isn't `watched`, which costs two compilations, is compared by its logits, and value by value where they differ.
    """
    names = candidate.name, reference.name
    # The same function as training compiles it.
    compiled = "logits as training compiles them"
    ours, theirs = candidate.logits(tokens_BT), reference.logits(tokens_BT)
    found = divergence.compare({compiled: ours}, {compiled: theirs}, names)
    values, shown = None, INTERMEDIATES.of(candidate) and INTERMEDIATES.of(reference)
    if shown and (watched or not divergence.worst_of(found) <= limits.FORWARD):
        values = candidate.intermediates(tokens_BT), reference.intermediates(tokens_BT)
        found = divergence.compare(*values, names) + found
    worst, where = divergence.worst_of(found), first_beyond(found, limits.FORWARD)
    if values is not None:
        if not worst <= limits.FORWARD:
            where += diagnosis.hint(found, limits.FORWARD, *values, names, reference.weights, tokens_BT)
        # Capturing must not change what is computed.
        plain = candidate.plain_logits(tokens_BT) if PLAIN_LOGITS.of(candidate) else ours
        if not np.array_equal(values[0]["logits"], plain, equal_nan=True):
            worst, where = math.nan, f"capturing values changed the logits; with them captured: {where}"
    if evidence is not None:
        differences = [(d.name, d.difference) for d in found]
        evidence["forward"] = Depth("Error by depth, forward", differences, limits.FORWARD)
    return Result("forward", f"{len(found)} values, {title}", worst, limits.FORWARD, where)


def agreement_in_float32(weights: Weights) -> tuple[float, float]:
    """How far the logits of the two models are apart, over the largest, and the limit: a first look, in the memory that
    float32 takes. `check` is the proof."""
    config = weights.config
    tokens_BT = (np.arange(min(config.block_size, 32))[None] * 7919) % config.vocab_size
    candidate, reference = both(weights)
    theirs = reference.make(weights, "float32").logits(tokens_BT)
    ours = candidate.make(weights, "float32").logits(tokens_BT)
    return relative_to_largest(ours, theirs), limits.FLOAT32_LOGITS


def _with_padded_vocabulary(weights: Weights) -> Weights:
    """The same model with rows of zeros for ids that no tokenizer gives."""
    config = weights.config
    size = 64 * (config.vocab_size // 64 + 1)
    rows = {"wte.weight", "lm_head.weight"} & set(weights.arrays)
    padding = ((0, size - config.vocab_size), (0, 0))
    arrays = dict(weights.arrays) | {name: np.pad(weights.arrays[name], padding) for name in rows}
    return dataclasses.replace(weights, config=dataclasses.replace(config, vocab_size=size), arrays=arrays)
