"""Check `schedule`: the learning rate that each trainer's step really applied, against a closed form of its own.

What was applied is read off a parameter: decoupled decay multiplies one whose gradient is zero by 1 - rate x decay. The
row of a token embedding that no batch uses, in a model whose head has a weight of its own, is such a parameter.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from gpt2_core.batches import Batch
from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from parity.sides import JaxSide, TorchSide
from parity.subjects import random_weights
from parity.suite import Result, Subject

# Of the peak: a float64 ratio of two weights is known to 2e-16, and the peak here is 0.5.
LIMIT = 1e-14
_PEAK = 0.5
_MODEL = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=9, tie_embeddings=False)
_UNUSED = 8

# (warmup, steps, final fraction)
_SCHEDULES = ((3, 10, 0.1), (0, 6, 0.0), (5, 5, 0.1), (1, 8, 1.0))


def check(subject: Subject) -> Iterator[Result]:
    weights = random_weights(_MODEL)
    sides = {"JAX": JaxSide(weights), "PyTorch": TorchSide(weights)}
    for warmup, steps, final in subject.at(_SCHEDULES[:1], _SCHEDULES):
        optimizer = OptimizerConfig(
            learning_rate=_PEAK, warmup_steps=warmup, final_fraction=final, weight_decay=1.0, clip_norm=1e-3
        )
        config = TrainConfig(model=_MODEL, optimizer=optimizer, steps=steps, batch_size=2, precision="float64", mesh=1)
        expected = [_closed_form(step, warmup, steps, final) for step in range(steps)]
        for name, side in sides.items():
            applied = _applied(side, config, weights.arrays["wte.weight"][_UNUSED])
            differences = np.abs(applied - expected) / _PEAK
            worst = int(np.argmax(differences))
            case = f"{name}: warmup {warmup} of {steps} steps, down to {final}"
            where = f"largest at step {worst}: {applied[worst]:.6f} where {expected[worst]:.6f} is due"
            yield Result("schedule", case, float(differences[worst]), LIMIT, where)


def _applied(side: JaxSide | TorchSide, config: TrainConfig, before: np.ndarray) -> np.ndarray:
    rows = side.train(config, [_batch(step) for step in range(config.steps)]).watched
    values = [before.astype(np.float64), *(table[_UNUSED] for table in rows)]
    return np.array([np.mean(1.0 - after / value) for value, after in itertools.pairwise(values)])


def _batch(step: int) -> Batch:
    ids = np.random.default_rng(step).integers(_UNUSED, size=(2, 5)).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:])


def _closed_form(step: int, warmup: int, steps: int, final: float) -> float:
    """Linear from peak / warmup to the peak at the last warmup step, then half a cosine."""
    if step + 1 <= warmup:
        return _PEAK * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return _PEAK * (final + (1 - final) * math.cos(angle / 2) ** 2)
