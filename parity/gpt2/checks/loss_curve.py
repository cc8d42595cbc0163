"""Check `loss_curve`: both trainers' own steps, on the same real text, in float64.

Training is AdamW with warmup, cosine, decay mask and clipping that is really active. The peak learning rate is the
suite's own: at 3e-4 a curve is stable and rounding stays rounding; at 3e-3 even float64 turns chaotic, and a curve
proves nothing. To show how far chaos alone would go, the reference trains once more from weights 1e-16 away.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gpt2_core.config import OptimizerConfig, TrainConfig
from gpt2_core.data.batches import TrainingBatches
from gpt2_core.weights import Weights
from parity.engine.adapter import lacking
from parity.engine.evidence import Curves
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import TRAINING, Adapter
from parity.gpt2.cases import Case
from parity.gpt2.steps import first_divergence

PEAK_LEARNING_RATE = 3e-4


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    if skipped := lacking("loss_curve", "AdamW steps", (candidate, TRAINING), (reference, TRAINING)):
        yield skipped
        return
    steps = case.steps or case.at(40, 200, 1000)
    stream = TrainingBatches(case.tokens, sequence_length=case.weights.config.block_size, batch_size=4, seed=case.seed)
    batches = [stream[step] for step in range(steps)]
    # Clip at half of the first gradient's norm, whatever these weights' gradients are like.
    first = reference.train(_config(case, steps, 1.0), batches[:1]).grad_norms[0]
    config = _config(case, steps, float(first) / 2)
    a, b = candidate.train(config, batches), reference.train(config, batches)
    differences = np.abs(a.losses - b.losses)
    clipped = int((b.grad_norms > config.optimizer.clip_norm).sum())
    nudged = reference.make(_nudged(case.weights)).train(config, batches).losses
    limit = limits.curve(steps)
    case.evidence["loss_curve"] = Curves(a.losses, b.losses, nudged, limit)
    where = f"largest at step {np.argmax(differences)}; loss {b.losses[0]:.3f} to {b.losses[-1]:.3f}"
    if (beyond := ~(differences <= limit)).any():
        where = f"losses part at step {np.argmax(beyond)}"
        where += f"; {first_divergence(case.weights, candidate, reference, config, config, batches)}"
    title = f"{steps} AdamW steps, {clipped} of them clipped"
    yield Result("loss_curve", title, float(np.max(differences)), limit, where)
    # A clipping formula is compared only where it acts.
    yield Result("loss_curve", "clipping left untested (0: no, 1: yes)", float(clipped == 0), limits.NONE)


def _config(case: Case, steps: int, clip_norm: float) -> TrainConfig:
    return TrainConfig(
        model=case.weights.config,
        optimizer=OptimizerConfig(
            learning_rate=PEAK_LEARNING_RATE, warmup_steps=max(1, steps // 10), clip_norm=clip_norm
        ),
        steps=steps,
        batch_size=4,
        accumulation=2,
        precision="float64",
        mesh=1,
    )


def _nudged(weights: Weights) -> Weights:
    """The same weights, each moved by one part in 1e16."""
    generator = np.random.default_rng(0)
    arrays = {
        name: array.astype(np.float64) * (1 + 1e-16 * generator.choice([-2, 2], array.shape))
        for name, array in weights.arrays.items()
    }
    return dataclasses.replace(weights, arrays=arrays)
