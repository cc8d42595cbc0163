"""Check `optimizer`: parameters and both moments after AdamW steps, and the decay that each tensor really gets."""

from collections.abc import Iterator

import jax
import numpy as np
import torch

import gpt2_jax.train_step
import gpt2_torch.optimizer
from gpt2_core.config import OptimizerConfig, TrainConfig
from gpt2_jax.weights import canonical_arrays as jax_arrays
from gpt2_torch.weights import build
from gpt2_torch.weights import canonical_arrays as torch_arrays
from parity.gradients import uneven_batch
from parity.sides import JaxSide, TorchSide, Trained
from parity.suite import Result, Subject, relative_norm

# Ten steps of float64; the root and the division by it cost a few units in the last place.
LIMIT = 1e-10


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    batch = uneven_batch(subject)
    norm = theirs.train(_config(subject, 1, 0.0), [batch]).grad_norms[0]
    for steps in (1, 10):
        for clipping, clip_norm in (("inactive", 1e6 * norm), ("active", norm / 10)):
            if subject.level == "quick" and (steps == 1) == (clipping == "inactive"):
                continue  # one step clipped, ten not
            config = _config(subject, steps, clip_norm)
            a, b = ours.train(config, [batch] * steps), theirs.train(config, [batch] * steps)
            yield _compare(a, b, f"{steps} AdamW steps, clipping {clipping}")
    for name, decays in (("JAX", _jax_decay), ("PyTorch", _torch_decay)):
        applied = decays(subject)
        wrong = {n: abs(applied[n] - (0.1 if len(s) >= 2 else 0.0)) for n, s in _shapes(subject).items()}
        worst = max(wrong, key=wrong.__getitem__)
        where = f"{worst}: {applied[worst]:.3g}" if wrong[worst] > LIMIT else "0.1 on matrices, 0 on vectors"
        yield Result("optimizer", f"{name}: decay of each of {len(wrong)} tensors", wrong[worst], LIMIT, where)


def _config(subject: Subject, steps: int, clip_norm: float) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, clip_norm=float(clip_norm))
    return TrainConfig(
        model=subject.weights.config, optimizer=optimizer, steps=steps, batch_size=4, precision="float64", mesh=1
    )


def _compare(a: Trained, b: Trained, case: str) -> Result:
    parts = (
        ("second moment", a.second_moments, b.second_moments),
        ("first moment", a.first_moments, b.first_moments),
        ("parameter", a.params, b.params),
    )
    differences = {f"{what} {n}": relative_norm(x[n], y[n]) for what, x, y in parts for n in y}
    worst = max(differences, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
    return Result("optimizer", case, differences[worst], LIMIT, f"largest in {worst}")


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
