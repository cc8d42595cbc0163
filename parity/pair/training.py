"""One optimizer step and a loss curve of both models, each with its own framework's optimizer."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from parity.engine import results as measures
from parity.engine.evidence import Curves
from parity.engine.results import Result

CURVE = 1e-9
"""Largest difference of losses, relative to the largest. Right programs measure 1e-14 after twenty steps."""
CHAOTIC = 1e-9
"""A parameter that moves by this after one step when weights change by one rounding says nothing."""
CHAOS = 100.0
"""How far beyond what one rounding becomes in the reference itself two right programs may part."""
ROUNDED = 1e-5
"""Limit where one of the models rounds to float32 on the way."""


def check(name: str, comparison: Any, found: Any, options: dict) -> Iterator[Result]:
    """`name` is "optimizer" (parameters after one step) or "loss_curve"."""
    theirs, ours = comparison.cases[0]
    losses = options["loss"] if isinstance(options["loss"], tuple) else (options["loss"],) * 2
    optimizers = options["optimizer"]
    steps = 1 if name == "optimizer" else options["steps"]
    reference, candidate = comparison.reference, comparison.candidate
    held = comparison.weights
    b = reference.train(held["reference"], theirs, losses[0], optimizers[0], steps)
    a = candidate.train(held["candidate"], ours, losses[1], optimizers[1], steps)
    casts = [*reference.narrow_casts(theirs), *candidate.narrow_casts(ours)]
    rounded = "; one of the models rounds to float32 on the way" if casts else ""
    if name == "optimizer":
        # A gradient that is zero but for rounding becomes a step of any size where it is divided by its own size.
        again = reference.train(_nudged(held["reference"]), theirs, losses[0], optimizers[0], steps)
        own = {n for n, x in b.after_one.items() if measures.relative_to_largest(again.after_one[n], x) > CHAOTIC}
        chaotic = {r.target for r in comparison.mapping.rows if own & {r.target, *r.source}}
        worst, where = 0.0, ""
        for target, difference in _differences(comparison, a.after_one, b.after_one):
            if target not in chaotic and not difference <= worst:
                worst, where = difference, target
        left = f"; without {', '.join(sorted(chaotic))}, whose gradients are zero but for rounding" if chaotic else ""
        limit = ROUNDED if casts else CURVE
        yield Result(name, "parameters after one step", worst, limit, f"largest at {where}{rounded}{left}")
        return
    nudged = reference.train(_nudged(held["reference"]), theirs, losses[0], optimizers[0], steps)
    scale = np.abs(b.losses).max() or 1.0
    floor = float(np.abs(nudged.losses - b.losses).max() / scale)
    limit = max(ROUNDED if casts else CURVE, CHAOS * floor)
    difference = np.abs(a.losses - b.losses) / scale
    beyond = np.flatnonzero(~(difference <= limit))
    where = f"first at step {beyond[0]}" if beyond.size else f"loss {b.losses[0]:.4g} to {b.losses[-1]:.4g}"
    found.evidence["loss_curve"] = Curves(a.losses, b.losses, nudged.losses, limit * scale)
    measured = float(difference.max()) if np.isfinite(difference).all() else float("nan")
    yield Result(
        name, f"{steps} steps", measured, limit, f"{where}; the reference from one rounding away {floor:.0e}{rounded}"
    )


def _differences(comparison: Any, ours: dict, theirs: dict) -> Iterator[tuple[str, float]]:
    source, target = (theirs, ours) if comparison.source is comparison.reference else (ours, theirs)
    for row in comparison.mapping.rows:
        if row.target in target and all(n in source for n in row.source):
            # Two biases that are added move alike, so that their sum moves twice as far as one bias does.
            if any(kind == "add" for kind, _ in row.transform.steps):
                continue
            made = row.transform(*(source[n] for n in row.source))
            yield row.target, measures.relative_to_largest(target[row.target], made)


def _nudged(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each weight one rounding away."""
    rng = np.random.default_rng(2)
    return {n: np.nextafter(w, w + rng.choice([-1.0, 1.0], w.shape)) for n, w in weights.items()}
