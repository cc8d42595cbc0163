"""One optimizer step and a loss curve of both models, each with its own framework's optimizer."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from parity.engine.divergence import Divergence as Difference
from parity.engine.divergence import first_beyond, worst_of
from parity.engine.evidence import Curves
from parity.engine.results import Result, Skipped, relative_to_largest
from parity.models.model import Arrays, Trained
from parity.pair.comparison import Comparison
from parity.pair.report import Report

CURVE = 1e-9
"""Largest difference of losses, relative to the largest. Correct programs measure 1e-14 after twenty steps."""
CHAOTIC = 1e-9
"""A parameter that moves by this after one step when weights change by one rounding says nothing."""
CHAOS = 100.0
"""How far beyond what one rounding becomes in the reference itself two correct programs may differ."""
TOO_CHAOTIC = 1e-3
"""A limit above this, because one rounding grows so fast, says nothing of the two models."""
ROUNDED = 1e-5
"""Limit where one of the models rounds to float32 on the way."""
ROUNDING32 = 2.0**-24
"""Of float32: its largest relative rounding."""
ROLES = ("candidate", "reference")

NONE_GIVEN = "no optimizer was given: optimizer=(lambda parameters: torch.optim..., optax...)"


def one_step(c: Comparison, loss: Any, optimizers: tuple[Any, Any] | None) -> Iterator[Result | Skipped]:
    """Parameters after one step."""
    if optimizers is None:
        yield Skipped("optimizer", NONE_GIVEN)
        return
    limit, rounded = _limit(c)
    ours, theirs = (_train(c, role, loss, optimizers, 1).after_one for role in ROLES)
    # A gradient that is zero but for rounding becomes a step of any size where it is divided by its own size.
    nudged = (_train(c, role, loss, optimizers, 1, ROUNDING32 if rounded else None).after_one for role in ROLES)
    most = ROUNDED if rounded else CHAOTIC
    moved = [
        {n for n, x in plain.items() if relative_to_largest(beside[n], x) > most}
        for plain, beside in zip((ours, theirs), nudged, strict=True)
    ]
    source, target = c.directed(ours, theirs)
    chaotic_source, chaotic_target = c.directed(*moved)
    found, left = [], []
    for row in c.rows(source, target):
        # The sum of two biases moves twice as far as the one bias that it is on the other side.
        if row.target in chaotic_target or chaotic_source & set(row.source) or row.transform.adds:
            left.append(row.target)
            continue
        made = row.transform(*(source[n] for n in row.source))
        found.append(Difference(row.target, relative_to_largest(target[row.target], made)))
    if not found:
        yield Skipped("optimizer", "no parameter moves by more than rounding in one step")
        return
    without = f"; without {', '.join(left)}: sums, or gradients that are zero but for rounding" if left else ""
    title = f"{len(found)} parameters after one step"
    yield Result("optimizer", title, worst_of(found), limit, f"{first_beyond(found, limit)}{rounded}{without}")


def curve(
    c: Comparison, report: Report, loss: Any, optimizers: tuple[Any, Any] | None, steps: int
) -> Iterator[Result | Skipped]:
    """Losses of training on the first input."""
    if optimizers is None:
        yield Skipped("loss_curve", NONE_GIVEN)
        return
    ours, theirs = (_train(c, role, loss, optimizers, steps).losses for role in ROLES)
    nudged = _train(c, "reference", loss, optimizers, steps, None).losses
    scale = np.abs(theirs).max() or 1.0
    floor = float(np.abs(nudged - theirs).max() / scale)
    limit, rounded = _limit(c)
    limit = max(limit, CHAOS * floor)
    if not limit <= TOO_CHAOTIC:
        report.notes.append(
            f"loss_curve: one rounding grows to {floor:.0e} of the loss in {steps} steps, so that the curve shows "
            "nothing; give fewer steps or a lower learning rate"
        )
    difference = np.abs(ours - theirs) / scale
    beyond = np.flatnonzero(~(difference <= limit))
    where = f"first at step {beyond[0]}" if beyond.size else f"loss {theirs[0]:.4g} to {theirs[-1]:.4g}"
    report.evidence["loss_curve"] = Curves(ours, theirs, nudged, limit * scale)
    where = f"{where}; the reference from one rounding away {floor:.0e}{rounded}"
    yield Result("loss_curve", f"{steps} steps", float(np.max(difference)), limit, where)


def _train(
    c: Comparison, role: str, loss: Any, optimizers: tuple[Any, Any], steps: int, nudge: float | None = 0.0
) -> Trained:
    """Training of one of the ROLES, from its weights or from those that `nudge` makes of them."""
    side = 1 if role == "candidate" else 0
    model = c.candidate if side else c.reference
    held = c.weights["candidate" if side else "reference"]
    losses = loss if isinstance(loss, tuple) else (loss, loss)
    given = held if nudge == 0.0 else _nudged(held, nudge)
    return model.train(given, c.cases[0][side], losses[side], optimizers[side], steps)


def _limit(c: Comparison) -> tuple[float, str]:
    theirs, ours = c.cases[0]
    if c.reference.narrow_casts(theirs) or c.candidate.narrow_casts(ours):
        return ROUNDED, "; one of the models rounds to float32 on the way"
    return CURVE, ""


def _nudged(weights: Arrays, share: float | None) -> Arrays:
    """Each weight moved up or down: by this share of it, or by one rounding of its dtype (None)."""
    rng = np.random.default_rng(2)
    signs = {n: rng.choice([-1.0, 1.0], w.shape) for n, w in weights.items()}
    if share is None:
        return {n: np.nextafter(w, w + signs[n]) for n, w in weights.items()}
    return {n: w * (1 + share * signs[n]).astype(w.dtype) for n, w in weights.items()}
