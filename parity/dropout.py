"""Check `dropout`: training with dropout on, PyTorch given the masks that JAX drew; and what those masks are like."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from gpt2_core.batches import TrainingBatches
from gpt2_core.config import OptimizerConfig, TrainConfig
from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject

LIMIT = 1e-11  # as for a loss curve without dropout: with the same masks it is one
LIMIT_P = 6.0  # -log10 p, as in `initialization`
RATE = 0.2


def check(subject: Subject) -> Iterator[Result]:
    steps = subject.at(5, 20)
    model = dataclasses.replace(subject.weights.config, dropout=RATE)
    config = TrainConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2),
        steps=steps,
        batch_size=4,
        accumulation=2,
        precision="float64",
        mesh=1,
    )
    stream = TrainingBatches(subject.tokens, block_size=model.block_size, batch_size=4, seed=subject.seed)
    batches = [stream[step] for step in range(steps)]
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    masks = ours.dropout_masks(config, batches)
    b = theirs.train(config, batches, masks)
    for kernel in subject.at(("xla",), ("xla", "recompute")):
        a = ours.train(dataclasses.replace(config, attention=kernel), batches)
        differences = np.abs(a.losses - b.losses)
        worst = int(np.argmax(differences))
        case = f"{steps} steps at rate {RATE}, {kernel} attention, PyTorch given JAX's masks"
        yield Result("dropout", case, float(differences[worst]), LIMIT, f"largest at step {worst}")

    drawn = [mask for step in masks for part in step for mask in part]
    distinct = len({mask.tobytes() for mask in drawn})
    case = f"{len(drawn)} masks: equal ones, over layers, sites, blocks of queries, steps and parts"
    yield Result("dropout", case, float(len(drawn) - distinct), 0.0)
    total, kept = sum(m.size for m in drawn), sum(int(m.sum()) for m in drawn)
    z = (kept - total * (1 - RATE)) / math.sqrt(total * RATE * (1 - RATE))
    p = math.erfc(abs(z) / math.sqrt(2))
    case = f"share kept of {total:,} elements, -log10 p"
    yield Result("dropout", case, -math.log10(max(p, 1e-300)), LIMIT_P, f"{kept / total:.5f} where {1 - RATE} is due")

    # Where no key is given, as in evaluation and generation, nothing is dropped.
    dropping = dataclasses.replace(subject.weights, config=model)
    tokens_BT = subject.tokens[: model.block_size][None]
    for name, side in (("JAX", JaxSide), ("PyTorch", TorchSide)):
        difference = np.abs(side(dropping).logits(tokens_BT) - side(subject.weights).logits(tokens_BT)).max()
        yield Result("dropout", f"{name}: evaluation drops nothing", float(difference), 0.0)
