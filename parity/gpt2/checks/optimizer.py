"""Check `optimizer`: parameters and both moments after AdamW steps, and the decay that each tensor really gets."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch

import gpt2_jax.train_step
import gpt2_torch.optimizer
from gpt2_core.config import OptimizerConfig, TrainConfig
from gpt2_jax.weights import canonical_arrays as jax_arrays
from gpt2_torch.weights import build
from gpt2_torch.weights import canonical_arrays as torch_arrays
from parity import places
from parity.gradients import uneven_batch
from parity.places import Place
from parity.sides import JaxSide, TorchSide
from parity.steps import LIMIT, in_step, side_by_side
from parity.suite import Result, Subject


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    batch = uneven_batch(subject)
    norm = theirs.train(_config(subject, 1, 0.0), [batch]).grad_norms[0]
    for steps in (1, 10):
        for clipping, clip_norm in (("inactive", 1e6 * norm), ("active", norm / 10)):
            if subject.level == "quick" and (steps == 1) == (clipping == "inactive"):
                continue  # one step clipped, ten not
            config = _config(subject, steps, clip_norm)
            a, b = ours.steps(config, [batch] * steps), theirs.steps(config, [batch] * steps)
            yield _compare(side_by_side(a, b), f"{steps} AdamW steps, clipping {clipping}")
    for name, decays in (("JAX", _jax_decay), ("PyTorch", _torch_decay)):
        applied = decays(subject)
        wrong = {n: abs(applied[n] - (0.1 if len(s) >= 2 else 0.0)) for n, s in _shapes(subject).items()}
        first = next((n for n in wrong if not wrong[n] <= LIMIT), None)
        where = f"{first}: {applied[first]:.3g}" if first else "0.1 on matrices, 0 on vectors"
        measured = float(np.max(list(wrong.values())))
        yield Result("optimizer", f"{name}: decay of each of {len(wrong)} tensors", measured, LIMIT, where)


def _config(subject: Subject, steps: int, clip_norm: float) -> TrainConfig:
    # A constant rate, so that what fails here is no schedule; and a small one: the gradient of a key's bias is zero but
    # for rounding, which Adam divides by its epsilon and the rate carries into the parameter.
    optimizer = OptimizerConfig(learning_rate=2e-4, warmup_steps=0, final_fraction=1.0, clip_norm=float(clip_norm))
    return TrainConfig(
        model=subject.weights.config, optimizer=optimizer, steps=steps, batch_size=4, precision="float64", mesh=1
    )


def _compare(compared: Iterator[tuple[list[Place], Any]], case: str) -> Result:
    """Up to the first step that differs: those after it only carry it on."""
    largest = (0.0, "nothing differs")
    for number, (found, _) in enumerate(compared):
        worst = places.worst_of(found)
        if not worst <= LIMIT:
            return Result("optimizer", case, worst, LIMIT, f"step {number}: {in_step(found)}")
        largest = max(largest, (worst, f"step {number}, {places.first_beyond(found, LIMIT)}"))
    return Result("optimizer", case, largest[0], LIMIT, largest[1])


def _shapes(subject: Subject) -> dict[str, tuple[int, ...]]:
    return subject.weights.config.parameter_shapes


def _jax_decay(subject: Subject) -> dict[str, float]:
    """Decay over learning rate, from an update whose gradients are all zero."""
    side, config = JaxSide(subject.weights), subject.weights.config
    optimizer = gpt2_jax.train_step.make_optimizer(OptimizerConfig(weight_decay=0.1), config)
    zeros = jax.tree.map(np.zeros_like, side.params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(side.params), side.params)
    return _ratios(jax_arrays(updates, config), jax_arrays(side.params, config))


def _torch_decay(subject: Subject) -> dict[str, float]:
    model = build(subject.weights.astype(np.float64))
    before = torch_arrays({n: p.detach().clone() for n, p in model.named_parameters()}, model.config)
    optimizer = gpt2_torch.optimizer.make_optimizer(model, OptimizerConfig(weight_decay=0.1, learning_rate=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = torch_arrays(dict(model.named_parameters()), model.config)
    return _ratios({n: (before[n] - after[n]) / 0.5 for n in before}, before)


def _ratios(decay: dict[str, np.ndarray], of: dict[str, np.ndarray]) -> dict[str, float]:
    return {n: float(np.linalg.norm(decay[n]) / np.linalg.norm(of[n])) for n in of}
