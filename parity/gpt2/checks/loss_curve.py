"""Check `loss_curve`: both trainers' own steps, on the same real text, in float64.

Training is AdamW with warmup, cosine, decay mask and clipping that is really active. The peak learning rate is the
suite's own: at 3e-4 a curve is stable and rounding stays rounding; at 3e-3 even float64 turns chaotic, and a curve
proves nothing. To show how far chaos alone would go, PyTorch trains once more from weights 1e-16 away.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gpt2_core.batches import TrainingBatches
from gpt2_core.config import OptimizerConfig, TrainConfig
from parity.sides import JaxSide, TorchSide
from parity.steps import first_divergence
from parity.suite import Result, Subject

PEAK_LEARNING_RATE = 3e-4
# Measured at 2e-15 after 20 steps and 3e-12 after 1,500; the optax clipping formula alone would give 1e-8.
LIMIT = 1e-11
LIMIT_LONG = 1e-9  # from 1,000 steps on


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    steps = subject.steps or subject.at(40, 200, 1000)
    stream = TrainingBatches(
        subject.tokens, block_size=subject.weights.config.block_size, batch_size=4, seed=subject.seed
    )
    batches = [stream[step] for step in range(steps)]
    # Clip at half of the first gradient's norm, whatever these weights' gradients are like.
    first = theirs.train(_config(subject, steps, 1.0), batches[:1]).grad_norms[0]
    config = _config(subject, steps, float(first) / 2)
    a, b = ours.train(config, batches), theirs.train(config, batches)
    differences = np.abs(a.losses - b.losses)
    clipped = int((b.grad_norms > config.optimizer.clip_norm).sum())
    subject.evidence["loss_curve"] = {
        "JAX": a.losses,
        "PyTorch": b.losses,
        "PyTorch, from 1e-16 away": _nudged(subject).train(config, batches).losses,
    }
    limit = LIMIT if steps < 1000 else LIMIT_LONG
    where = f"largest at step {np.argmax(differences)}; loss {b.losses[0]:.3f} to {b.losses[-1]:.3f}"
    if (beyond := ~(differences <= limit)).any():
        again = ours.steps(config, batches), theirs.steps(config, batches)
        where = f"losses part at step {np.argmax(beyond)}"
        where += f"; {first_divergence(subject.weights, *again, config, batches)}"
    case = f"{steps} AdamW steps, {clipped} of them clipped"
    yield Result("loss_curve", case, float(np.max(differences)), limit, where)
    # A clipping formula is compared only where it acts.
    yield Result("loss_curve", "clipping left untested (0: no, 1: yes)", float(clipped == 0), 0.0)


def _config(subject: Subject, steps: int, clip_norm: float) -> TrainConfig:
    return TrainConfig(
        model=subject.weights.config,
        optimizer=OptimizerConfig(
            learning_rate=PEAK_LEARNING_RATE, warmup_steps=max(1, steps // 10), clip_norm=clip_norm
        ),
        steps=steps,
        batch_size=4,
        accumulation=2,
        precision="float64",
        mesh=1,
    )


def _nudged(subject: Subject) -> TorchSide:
    """The same weights, each moved by one part in 1e16."""
    generator = np.random.default_rng(0)
    arrays = {
        name: array.astype(np.float64) * (1 + 1e-16 * generator.choice([-2, 2], array.shape))
        for name, array in subject.weights.arrays.items()
    }
    return TorchSide(dataclasses.replace(subject.weights, arrays=arrays))
