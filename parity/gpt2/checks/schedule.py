"""Check `schedule`: the learning rate of every step, against three schedules that are none of the project's.

Both trainers take their rates from one function, so a mistake in it is no difference between them. It is compared with
a closed form, with PyTorch's own schedulers and with optax's. What a train step then applies is read off a parameter:
decoupled decay multiplies one whose gradient is zero by 1 - rate x decay. The row of a token embedding that no batch
uses, in a model whose head has a weight of its own, is such a parameter.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.data.batches import Batch
from parity.engine.adapter import lacking
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import RATES, TRAINING, Adapter
from parity.gpt2.cases import Case, random_weights

_PEAK = 0.5
_MODEL = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=9, tie_embeddings=False)
_UNUSED = 8

# (warmup, steps, final fraction): warmups of 0, 1, all and more than all of the steps, final fractions of 0 and 1, one
# step, and a run long enough for a slip of one step to be small.
_APPLIED = ((3, 10, 0.1), (0, 6, 0.0), (5, 5, 0.1), (1, 8, 1.0))
_SCHEDULES = (*_APPLIED, (0, 1, 0.1), (1, 1, 0.0), (7, 5, 0.3), (2, 3, 0.0), (100, 1000, 0.1))


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    for adapter in (candidate, reference):
        if skipped := lacking("schedule", "rates asked for", (adapter, RATES)):
            yield skipped
            continue
        found = []
        for warmup, steps, final in _SCHEDULES:
            optimizer = _optimizer(warmup, final)
            rates = np.array([adapter.learning_rate(step, steps, optimizer) for step in range(steps)])
            measured, where = _compare(rates, warmup, steps, final)
            found.append((measured, f"{_in_words(warmup, steps, final)}: {where}"))
        # The first that fails, a NaN too, or else the largest.
        measured, where = next((f for f in found if not f[0] <= limits.SCHEDULE), max(found))
        title = f"{adapter.name}'s trainer: {len(found)} schedules"
        yield Result("schedule", title, measured, limits.SCHEDULE, where)
    weights = random_weights(_MODEL)
    adapters = [candidate.make(weights), reference.make(weights)]
    for warmup, steps, final in case.at(_APPLIED[:1], _APPLIED):
        optimizer = _optimizer(warmup, final)
        config = TrainConfig(model=_MODEL, optimizer=optimizer, steps=steps, batch_size=2, precision="float64", mesh=1)
        for adapter in adapters:
            title = f"{adapter.name}'s step: {_in_words(warmup, steps, final)}"
            if skipped := lacking("schedule", title, (adapter, TRAINING)):
                yield skipped
                continue
            applied = _applied(adapter, config, weights.arrays["wte.weight"][_UNUSED])
            measured, where = _compare(applied, warmup, steps, final)
            yield Result("schedule", title, measured, limits.SCHEDULE, where)


def closed_form(step: int, warmup: int, steps: int, final: float) -> float:
    """The rate of the update after batch `step`, as a share of the peak: linear from 1 / warmup to 1 at the last warmup
    step, then half a cosine down to `final` at the end of the run."""
    if step + 1 <= warmup:
        return (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * math.cos(angle / 2) ** 2


def _by_closed_form(warmup: int, steps: int, final: float) -> np.ndarray:
    return _PEAK * np.array([closed_form(step, warmup, steps, final) for step in range(steps)])


def _by_torch(warmup: int, steps: int, final: float) -> np.ndarray:
    """PyTorch's schedulers: linear warmup, then cosine annealing."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=_PEAK)
    scheduler = CosineAnnealingLR(optimizer, max(1, steps - warmup), eta_min=final * _PEAK)
    if warmup:
        linear = LinearLR(optimizer, 1 / warmup, total_iters=max(1, warmup - 1))
        scheduler = SequentialLR(optimizer, [linear, scheduler], [warmup])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def _by_optax(warmup: int, steps: int, final: float) -> np.ndarray:
    """optax's schedules, joined likewise."""
    schedule = optax.cosine_decay_schedule(_PEAK, max(1, steps - warmup), alpha=final)
    if warmup:
        schedule = optax.join_schedules([optax.linear_schedule(_PEAK / warmup, _PEAK, warmup - 1), schedule], [warmup])
    with jax.enable_x64(True):
        return np.asarray(jax.jit(schedule)(np.arange(steps)))


_EXPECTATIONS: dict[str, Callable[[int, int, float], np.ndarray]] = {
    "the closed form": _by_closed_form,
    "torch.optim.lr_scheduler": _by_torch,
    "optax": _by_optax,
}


@functools.cache
def _due(warmup: int, steps: int, final: float) -> np.ndarray:
    """Rates (expectation, step), in the order of _EXPECTATIONS."""
    return np.array([rates_of(warmup, steps, final) for rates_of in _EXPECTATIONS.values()])


def _compare(rates: np.ndarray, warmup: int, steps: int, final: float) -> tuple[float, str]:
    """The largest difference from all three schedules, as a share of the peak, and the first step beyond the limit."""
    due = _due(warmup, steps, final)
    differences = np.abs(rates - due).T / _PEAK
    wrong = np.argwhere(~(differences <= limits.SCHEDULE))
    step, which = wrong[0] if len(wrong) else np.unravel_index(np.argmax(differences), differences.shape)
    where = (
        f"{'first' if len(wrong) else 'largest'} at step {step}: {rates[step]:.6f} where {due[which, step]:.6f} is due"
    )
    where += f" by {list(_EXPECTATIONS)[which]}"
    return float(np.max(differences)), where


def _in_words(warmup: int, steps: int, final: float) -> str:
    return f"warmup {warmup} of {steps} steps, down to {final}"


def _optimizer(warmup: int, final: float) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=_PEAK, warmup_steps=warmup, final_fraction=final, weight_decay=1.0, clip_norm=1e-3
    )


def _applied(adapter: Adapter, config: TrainConfig, before: np.ndarray) -> np.ndarray:
    rows = adapter.train(config, [_batch(step) for step in range(config.steps)]).watched
    values = [before.astype(np.float64), *(table[_UNUSED] for table in rows)]
    return np.array([np.mean(1.0 - after / value) for value, after in itertools.pairwise(values)])


def _batch(step: int) -> Batch:
    ids = np.random.default_rng(step).integers(_UNUSED, size=(2, 5)).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:])
