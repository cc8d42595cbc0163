"""What is compared of two models: weights, outputs, gradients, state, and (in `training`) an optimizer's steps.

A check is given the comparison, the report so far, where it leaves hints and doubts, and what the user asked for.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity.engine.divergence import Divergence as Difference
from parity.engine.divergence import first_beyond, worst_of
from parity.engine.errors import EngineError
from parity.engine.results import Result, Skipped, relative_norm, relative_to_largest
from parity.models.memory import give_back_memory
from parity.models.model import Arrays, Inputs, Model, Recording
from parity.pair import divergence, layouts, outputs, training
from parity.pair import inputs as generated
from parity.pair.capturing import Captured
from parity.pair.comparison import Comparison, checked
from parity.pair.fingerprints import CLOSE
from parity.pair.hints import hints
from parity.pair.mapping import Row
from parity.pair.report import Report

GRADIENTS = 1e-9
"""Norm of the difference over the norm, of each gradient. Correct programs measure 1e-14."""
ZERO = 1e-12
"""Of the largest gradient: below, a gradient is zero but for rounding."""
NARROW = 1.5
"""Largest ratio of the candidate's error to the reference's, where casts to narrower types are left in."""
PART = 2**29
"""Bytes of the gradients that are held of one model at a time, unless a single one is larger."""
FINEST = 1e-12
"""Of two values' fingerprints, in the search for where a small difference begins. Rounding measures 1e-14."""
OWN = float(np.finfo(np.float32).eps)
"""Largest difference of the models' own weights: one of them may have been converted through float32."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for, as `parity.compare` documents it."""

    loss: Any = None
    optimizer: tuple[Any, Any] | None = None
    steps: int = 20
    training: bool = False
    own: bool = False
    generate: bool = True


Check = Callable[[Comparison, Report, Options], Iterator[Result | Skipped]]


def weights(c: Comparison, found: Report, options: Options) -> Iterator[Result]:
    """The mapping is whole, nothing in it is unusual, and (own weights) the tensors are equal."""
    for role, left in (("reference", c.left("reference")), ("candidate", c.left("candidate"))):
        names = ", ".join(left[:8]) + ", ..." * (len(left) > 8)
        where = f"{names}: list them in ignore= if that is right" if left else ""
        yield Result("weights", f"weights of the {role} without a counterpart", float(len(left)), 0.0, where)
        if left:
            found.hints.append(f"{names} of the {role} {'have' if len(left) > 1 else 'has'} no counterpart")
    unusual = [
        f"{row.target} is {', '.join(row.source)} with {row.transform}, where its siblings have {usual or 'identity'}"
        for row, usual in c.mapping.unusual()
    ]
    yield Result("weights", "transforms unlike their siblings'", float(len(unusual)), 0.0, "; ".join(unusual))
    found.hints += [f"{u}: a transposed kernel; confirm with mapping= if it is meant" for u in unusual]
    if options.own:
        mine, theirs = ({w.name: w.value for w in m.weights()} for m in (c.source, c.target))
        made = c.mapping.apply(mine)
        yield _of_all("weights", "own weights", made, theirs, OWN, relative_to_largest)


def forward(c: Comparison, found: Report, options: Options) -> Iterator[Result]:
    for number, (theirs, ours) in enumerate(c.cases):
        case = "outputs" if len(c.cases) == 1 else f"outputs, input {number}"
        a = _run_twice(c.candidate, c.weights["candidate"], ours, "candidate")
        b = _run_twice(c.reference, c.weights["reference"], theirs, "reference")
        if not outputs.paired(a, b):
            shapes = f"{[list(x.shape) for x in a]} and {[list(x.shape) for x in b]}"
            raise EngineError(
                f"no output of the candidate has as many elements as one of the reference: shapes {shapes}"
            )
        found.notes += [
            f"{case}: output {j} of the reference is one number everywhere, which shows nothing; give another input"
            for j, y in enumerate(b)
            if outputs.is_one_number(y)
        ]
        worst = outputs.worst(a, b)
        if worst <= outputs.SAME:
            counted = f"{len(b)} {'array' if len(b) == 1 else 'arrays'}, {sum(y.size for y in b):,} values"
            yield Result("forward", case, worst, outputs.SAME, counted)
        elif lacking := outputs.lacking(a, b):
            shapes = ", ".join(f"output {j} of shape {list(b[j].shape)}" for j in lacking)
            yield Result("forward", case, math.inf, outputs.SAME, f"the candidate has no counterpart of {shapes}")
        else:
            yield from _parted(case, c, found, (theirs, ours), (a, b), worst)
    if found.first_divergence is None and options.generate:
        yield from _generated(c, found)


def _run_twice(model: Model, weights: Arrays, given: Inputs, role: str) -> list[np.ndarray]:
    """The outputs; raises EngineError if they aren't numbers, or others the second time."""
    first, again = model.run(weights, given), model.run(weights, given)
    give_back_memory()
    if any(not np.array_equal(x, y, equal_nan=True) for x, y in zip(first, again, strict=True)):
        raise EngineError(
            f"the {role} gives other outputs when it is called again on the same input: switch off what is random "
            "(dropout, sampling), or keep its random numbers fixed"
        )
    if any(np.isnan(x).any() for x in first):
        raise EngineError(f"the {role} returns NaN on these inputs and weights; compare where it is finite")
    return first


def _generated(c: Comparison, found: Report) -> Iterator[Result]:
    """Inputs made from the first one, casts lifted: what both models take, both must compute alike."""
    if isinstance(c.reference, Captured) or isinstance(c.candidate, Captured):
        return
    taken, refused, worst = [], [], 0.0
    for name, theirs in generated.generate(c.cases[0][0]):
        give_back_memory()
        try:
            ours = checked(Inputs.of(c.to_candidate(theirs.as_given()) if c.to_candidate else theirs))
            b = c.reference.run_lifted(c.weights["reference"], theirs)
            a = c.candidate.run_lifted(c.weights["candidate"], ours)
        except Exception:  # a size that one of the models doesn't take is no difference
            refused.append(name)
            continue
        difference = _where_finite(a, b)
        if not difference <= outputs.SAME and _read_tables(
            c.candidate, ours, c.reference.record(c.weights["reference"], theirs)
        ):
            difference = _where_finite(c.candidate.run_lifted(c.weights["candidate"], ours), b)
        taken.append(name)
        if not difference <= outputs.SAME:
            where = "the given inputs don't show it"
            yield Result("forward", f"generated input: {name}", difference, outputs.SAME, where)
            found.hints.append(f"only {name} shows a difference: what decides by size or value differs")
        else:
            worst = max(worst, difference)
    if taken:
        left = f"; not taken by both: {', '.join(refused)}" if refused else ""
        yield Result("forward", f"{len(taken)} generated inputs", worst, outputs.SAME, f"{', '.join(taken)}{left}")


def _where_finite(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference of outputs, where they are finite."""
    a, b = list(ours), list(theirs)
    if not outputs.lacking(a, b):
        for i, j in outputs.paired(a, b):
            a[i], b[j] = outputs.where_finite(a[i], b[j])
    return outputs.worst(a, b)


def _parted(case: str, c: Comparison, found: Report, given, computed, worst: float) -> Iterator[Result]:
    """Outputs differ: in what is computed, or only by the rounding of casts."""
    theirs, ours = given
    reference = c.reference.record(c.weights["reference"], theirs)
    _read_tables(c.candidate, ours, reference)
    candidate = c.candidate.record(c.weights["candidate"], ours)
    truth = outputs.of_recording(candidate), outputs.of_recording(reference)
    lifted = outputs.worst(*truth)
    if lifted <= outputs.SAME:
        del candidate, reference  # what is left to do runs the models again
        give_back_memory()
        yield Result("forward", f"{case}, casts to narrower types lifted", lifted, outputs.SAME, _casts(c, given))
        yield _rounding(case, c, theirs, computed, truth)
        return
    agreeing = [
        (i, j) for i, j in outputs.paired(*truth) if outputs.difference(truth[0][i], truth[1][j]) <= outputs.SAME
    ]
    # A small difference of outputs begins as a smaller one.
    close = min(CLOSE, max(FINEST, lifted / 100))
    place = divergence.locate(candidate, reference, agreeing, c.made_of("candidate"), close)
    if place:
        _remember(c, found, ours, candidate, reference, place)
    yield Result("forward", case, worst, outputs.SAME, str(place) if place else "")


def _remember(
    c: Comparison, found: Report, ours: Inputs, candidate: Recording, reference: Recording, place: divergence.Divergence
) -> None:
    """The first divergence of the first input that shows one, its causes, and hints of every one."""
    if found.first_divergence is None:
        found.first_divergence = place
        if hasattr(c.candidate, "program"):
            from parity.pair.causes import causes

            made_of = c.made_of("candidate")
            found.causes = causes(c.candidate, c.weights["candidate"], ours, reference, place, made_of).in_words()
    found.hints += [h for h in hints(candidate, reference, place) if h not in found.hints]


def _read_tables(candidate: Model, given: Inputs, reference: Recording) -> bool:
    """Whether the candidate had tables that are rounded to float32; it computes with the reference's then."""
    if not hasattr(candidate, "program"):
        return False
    from parity.pair.tables import read_tables

    return read_tables(candidate, given, reference)


def _rounding(case: str, c: Comparison, theirs: Inputs, computed, truth) -> Result:
    """Both compute the same. The candidate as it is written may be no further from it than the reference is, as it is
    written or in float32."""
    ours_error, theirs_error = (outputs.norm(a, b) for a, b in zip(computed, truth, strict=True))
    in_float32 = outputs.norm(c.reference.run_in_float32(c.weights["reference"], theirs), truth[1])
    # With so few numbers that their error is below one rounding, single roundings decide which is larger.
    allowed = max(theirs_error, in_float32, float(np.finfo(np.float32).eps))
    return Result(
        "forward",
        f"{case}, as written: the candidate's error over the reference's",
        ours_error / allowed,
        NARROW,
        f"from the float64 truth: candidate {ours_error:.1e}, reference {theirs_error:.1e} (float32 {in_float32:.1e})",
    )


def _casts(c: Comparison, given) -> str:
    found = []
    for who, model, inputs in (("reference", c.reference, given[0]), ("candidate", c.candidate, given[1])):
        casts = [f"{cast.dtype} at {cast.place}" for cast in model.narrow_casts(inputs)]
        if casts:
            found.append(f"{who} rounds to {', '.join(casts[:6])}{', ...' if len(casts) > 6 else ''}")
    return "; ".join(found)


def gradients(c: Comparison, found: Report, options: Options) -> Iterator[Result | Skipped]:
    theirs, ours = c.cases[0]
    a, b = c.candidate.run(c.weights["candidate"], ours), c.reference.run(c.weights["reference"], theirs)
    rng = np.random.default_rng(1)
    cotangents = [np.zeros(x.shape) for x in a], [np.zeros(x.shape) for x in b]
    for i, j in outputs.paired(a, b):
        drawn = rng.standard_normal(b[j].shape)
        axes = layouts.permutation(b[j], a[i], 1e-3)
        cotangents[0][i] = (drawn.transpose(axes) if axes else drawn).reshape(a[i].shape)
        cotangents[1][j] = drawn
    del a, b
    measured, parts, inputs = [], _in_parts(c), []
    for rows in parts:
        give_back_memory()
        of = c.undirected({n for r in rows for n in r.source}, {r.target for r in rows})
        by_ours = c.candidate.gradients(c.weights["candidate"], ours, cotangents[0], of[0])
        give_back_memory()
        by_theirs = c.reference.gradients(c.weights["reference"], theirs, cotangents[1], of[1])
        give_back_memory()
        measured += _gradient_differences(c, rows, *c.directed(by_ours[0], by_theirs[0]))
        inputs = [(n, x, y) for (n, x), y in zip(by_ours[1].items(), by_theirs[1].values(), strict=False)]
        del by_ours, by_theirs
    zero = ZERO * max((size for _, size in measured), default=0.0)
    differences = [Difference(d.name, 0.0) if size <= zero else d for d, size in measured]
    if not differences and not inputs:
        yield Skipped("gradients", "the models have no weights in common and no floating-point inputs")
    if differences:
        worst = worst_of(differences)
        where = first_beyond(differences, GRADIENTS) if worst <= GRADIENTS else _in_backward_order(c, differences)
        yield Result("gradients", f"of {len(differences)} weights", worst, GRADIENTS, where)
    for name, x, y in inputs:
        yield Result("gradients", f"of {name}", outputs.difference(x, y), GRADIENTS)


def _in_backward_order(c: Comparison, differences: list[Difference]) -> str:
    """The first weight, from the outputs back, whose gradient differs: what is wrong is used after it."""
    role = "candidate" if c.from_reference else "reference"
    recording = c.target.record(c.weights[role], c.cases[0][c.from_reference])
    place = {name: number for number, name in enumerate(recording.order_of_use)}

    def first_use(difference: Difference) -> int:
        return min(place.get(name, len(place)) for name in difference.name.split(" + "))

    ordered = sorted(differences, key=first_use, reverse=True)
    return f"in the order of the backward pass {first_beyond(ordered, GRADIENTS)}"


def _in_parts(c: Comparison) -> list[list[Row]]:
    """The mapping's rows, so many together that the gradients of their weights fit into PART. Those made of the same
    tensors of the source stay together."""
    several: dict[tuple[str, ...], list[Row]] = {}
    for row in c.mapping.rows:
        several.setdefault(row.source, []).append(row)
    parts: list[list[Row]] = [[]]
    held = 0
    for names, rows in several.items():
        size = sum(8 * math.prod(c.mapping.shapes[n]) for n in names)
        if parts[-1] and held + size > PART:
            parts.append([])
            held = 0
        parts[-1] += rows
        held += size
    return parts


def _gradient_differences(
    c: Comparison, rows: list[Row], source: Arrays, target: Arrays
) -> list[tuple[Difference, float]]:
    """Of every trained weight of the target among these rows, under its name, with its largest magnitude."""
    # One tensor of the source may serve several of the target (tied on one side only): their gradients add up.
    several: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.target in target and all(n in source for n in row.source):
            several.setdefault(row.source, []).append(row)
    found = []
    frozen = {w.name for w in (*c.source.weights(), *c.target.weights()) if w.frozen}
    for names, rows in several.items():
        # What one model freezes by a flag, the other stops the gradient of.
        if frozen.intersection((*names, *(r.target for r in rows))) and not any(target[r.target].any() for r in rows):
            continue
        if len(rows) > 1 and all(r.transform.can_undo() for r in rows):
            whole = source[names[0]]
            total = sum(r.transform.undo(target[r.target], whole.shape) for r in rows)
            found.append(_measured(" + ".join(r.target for r in rows), total, whole))
            continue
        found += [
            _measured(r.target, target[r.target], r.transform.gradient(*(source[n] for n in names))) for r in rows
        ]
    return found


def _measured(name: str, ours: np.ndarray, theirs: np.ndarray) -> tuple[Difference, float]:
    return Difference(name, relative_norm(ours, theirs)), max(_largest(theirs), _largest(ours))


def _largest(x: np.ndarray) -> float:
    """The largest magnitude, without an array of magnitudes: gradients are as large as the model."""
    return float(max(x.max(initial=0.0), -x.min(initial=0.0)))


def state(c: Comparison, found: Report, options: Options) -> Iterator[Result | Skipped]:
    if not options.training:
        yield Skipped("state", "state changes in training only: give mode='train'")
        return
    theirs, ours = c.cases[0]
    source, target = c.directed(
        c.candidate.state_after(c.weights["candidate"], ours), c.reference.state_after(c.weights["reference"], theirs)
    )
    before, _ = c.directed(c.weights["candidate"], c.weights["reference"])
    rows = c.rows(source, target)
    if not rows:
        yield Skipped("state", "no buffer of the two models is mapped to another's")
    for row in rows:
        made = row.transform(*(source[n] for n in row.source))
        difference = relative_norm(target[row.target], made)
        yield Result("state", row.target, difference, GRADIENTS)
        if not difference <= GRADIENTS:
            was = row.transform(*(before[n] for n in row.source))
            found.hints.append(_state_hint(row.target, was, *c.undirected(made, target[row.target])))


def _state_hint(name: str, before: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> str:
    """Both move from `before` towards a statistic of the batch; by how much each?"""
    a, b = ours - before, theirs - before
    ratio = float(np.vdot(b, a) / np.vdot(b, b)) if np.vdot(b, b) else math.nan
    if np.allclose(a, ratio * b, rtol=1e-6, atol=1e-12):
        return (
            f"{name} moves {ratio:.4g} times as far in the candidate as in the reference in one step: momentum m of "
            "PyTorch is 1 - m of Flax (0.1 there is 0.9 here)"
        )
    return f"{name} differs by more than a factor: PyTorch keeps the unbiased variance (Bessel's correction) in it"


def optimizer(c: Comparison, found: Report, options: Options) -> Iterator[Result | Skipped]:
    yield from training.one_step(c, options.loss, options.optimizer)


def loss_curve(c: Comparison, found: Report, options: Options) -> Iterator[Result | Skipped]:
    yield from training.curve(c, found, options.loss, options.optimizer, options.steps)


def _of_all(check: str, title: str, ours: Arrays, theirs: Arrays, limit: float, measure) -> Result:
    """The largest difference of several tensors, and the first beyond the limit."""
    found = [Difference(name, measure(theirs[name], x)) for name, x in ours.items()]
    if not found:
        return Result(check, f"{title}: none in common", 0.0, limit)
    return Result(check, f"{title}: {len(found)} tensors", worst_of(found), limit, first_beyond(found, limit))


CHECKS: dict[str, Check] = {f.__name__: f for f in (weights, forward, gradients, state, optimizer, loss_curve)}
DEFAULT = ("weights", "forward", "gradients")
