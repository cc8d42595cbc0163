"""One comparison of two models, from opening them to the report: what `parity.compare` does."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as Map
from typing import Any

import numpy as np

from parity.engine import results as measures
from parity.engine.errors import EngineError
from parity.engine.results import Result, Skipped
from parity.models.model import Arrays, Inputs, Model, Weight
from parity.models.opening import open_model
from parity.pair import divergence, layouts
from parity.pair import inputs as generated
from parity.pair import weights as drawing
from parity.pair.by_name import rows_by_name
from parity.pair.by_value import rows_by_value
from parity.pair.capturing import Captured
from parity.pair.causes import causes
from parity.pair.hints import hints as hints_of
from parity.pair.mapping import Mapping, complete, from_table, with_buffers, with_unused
from parity.pair.report import Report

FORWARD = 1e-10
"""Largest difference of an output, relative to its largest magnitude. Right programs measure 1e-15, deep ones 1e-13."""
GRADIENTS = 1e-9
"""Norm of the difference over the norm, of each gradient. Right programs measure 1e-14."""
NOTHING = 1e-30
"""A gradient or an output below this, relative to the others, is zero for both."""
NARROW = 1.5
"""Largest ratio of the candidate's error to the reference's, where casts to narrower types are left in."""

CHECKS = ("weights", "forward", "gradients", "state", "optimizer", "loss_curve")
DEFAULT = ("weights", "forward", "gradients")


@dataclasses.dataclass
class Comparison:
    """Two opened models and the mapping between them."""

    reference: Model
    candidate: Model
    source: Model
    target: Model
    cases: list[tuple[Inputs, Inputs]]
    mapping: Mapping
    weights: dict[str, Arrays]
    """By role."""
    to_candidate: Callable[[Any], Any] | None = None

    def made_of(self, role: str) -> dict[str, tuple[str, ...]]:
        """Of each weight of this role's model the weights of the other one that are the same."""
        if (self.target is self.candidate) == (role == "candidate"):
            return {row.target: row.source for row in self.mapping.rows}
        back: dict[str, tuple[str, ...]] = {}
        for row in self.mapping.rows:
            for name in row.source:
                back[name] = (*back.get(name, ()), row.target)
        return back

    @property
    def names(self) -> tuple[str, str]:
        if self.candidate.framework != self.reference.framework:
            return self.candidate.framework, self.reference.framework
        return "candidate", "reference"


def compare(
    reference: Any,
    candidate: Any,
    *,
    inputs: Any,
    to_candidate: Callable[[Any], Any] | None = None,
    checks: Sequence[str] = DEFAULT,
    mapping: Any = None,
    ignore: Sequence[str] = (),
    loss: Any = None,
    optimizer: tuple[Any, Any] | None = None,
    steps: int = 20,
    mode: str = "eval",
    weights: str = "random",
    seed: int = 0,
    generate: bool = True,
    mutants: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Whether two models are one: see docs/parity.md for every argument.

    Args:
        reference, candidate: what `parity.models.opening.KINDS` lists, of either framework.
        inputs: an array; a tuple of arrays for several arguments; a dict for keyword arguments; a list of such; or a
            function that returns one of these.
        to_candidate: makes the candidate's inputs of the reference's, where layouts differ.
        checks: among CHECKS.
        mapping: a mapping of weights, as `Report.mapping_yaml` writes it, its path, or {target: source}.
        ignore: names of weights, of either side, that have no counterpart.
        loss: a function of (outputs of the model, *inputs), or a pair of them, reference's and candidate's; left out,
            the sum of the first output times fixed random numbers.
        optimizer: (a function of parameters that returns a torch.optim optimizer, an optax transformation).
        mode: "eval", or "train" with dropout off.
        weights: "random": random ones in which every tensor matters, in both models; "own": each model's own.
        generate: compare on inputs made from the given one too: longer, an odd batch, extreme values.
        mutants: how many changes of the candidate's program to try, for the mutation score.

    Raises:
        EngineError: in one sentence, where the two can't be compared as asked.
    """
    say = progress or (lambda _: None)
    for check in checks:
        if check not in CHECKS:
            raise EngineError(f"checks: no check is called {check!r}; there are {', '.join(CHECKS)}")
    if mode not in ("eval", "train"):
        raise EngineError(f"mode {mode!r}: expected 'eval' or 'train'")
    if weights not in ("random", "own"):
        raise EngineError(f"weights {weights!r}: expected 'random' or 'own'")
    comparison = opened(
        reference,
        candidate,
        inputs=inputs,
        to_candidate=to_candidate,
        mapping=mapping,
        ignore=ignore,
        mode=mode,
        weights=weights,
        seed=seed,
        progress=say,
    )
    found = Report(comparison.names, [], [], None, [], comparison.mapping)
    found.from_reference = comparison.source is comparison.reference
    for check in checks:
        say(check)
        _run(
            check,
            comparison,
            found,
            loss=loss,
            optimizer=optimizer,
            steps=steps,
            mode=mode,
            own=weights == "own",
            generate=generate,
        )
    if mutants:
        from parity.pair.score import mutation_score

        say(f"{mutants} changes of the candidate")
        found.mutation_score = mutation_score(comparison, mutants, seed, FORWARD)
    return found


def opened(
    reference: Any,
    candidate: Any,
    *,
    inputs: Any,
    to_candidate: Callable[[Any], Any] | None = None,
    mapping: Any = None,
    ignore: Sequence[str] = (),
    mode: str = "eval",
    weights: str = "random",
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Both models with their mapping and weights; arguments as of `compare`."""
    progress("opening both models")
    cases = _cases(inputs, to_candidate)
    models = [open_model(m, r, mode == "train") for m, r in ((reference, "reference"), (candidate, "candidate"))]
    if any(isinstance(m, Captured) for m in models):
        weights = "own" if isinstance(models[1], Captured) else weights
    found = _map(*models, cases, mapping, ignore, weights, seed, progress)
    return dataclasses.replace(found, to_candidate=to_candidate)


def _cases(inputs: Any, to_candidate: Callable[[Any], Any] | None) -> list[tuple[Inputs, Inputs]]:
    given = inputs() if callable(inputs) else inputs
    several = given if isinstance(given, list) else [given]
    if not several:
        raise EngineError("inputs: the list is empty; give at least one input")
    convert = to_candidate or (lambda x: x)
    return [(_checked(Inputs.of(x)), _checked(Inputs.of(convert(x)))) for x in several]


def _checked(inputs: Inputs) -> Inputs:
    values = []
    for name, x in zip(inputs.names(), inputs.values(), strict=True):
        array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        if array.dtype.kind not in "fiub" and not array.dtype.name.startswith("bfloat"):
            raise EngineError(f"{name} is of type {array.dtype}; expected an array of numbers")
        values.append(array)
    return inputs.with_values(values)


# --- Weights ---


def _map(reference, candidate, cases, given, ignore, own, seed, say) -> Comparison:
    """The mapping, and weights for both sides."""
    from_reference = hasattr(candidate, "program") or not hasattr(reference, "program")
    source, target = (reference, candidate) if from_reference else (candidate, reference)
    mine, theirs = {w.name: w for w in source.weights()}, {w.name: w for w in target.weights()}
    for name in ignore:
        if name not in mine and name not in theirs:
            raise EngineError(f"ignore: {name} is a weight of neither model")
    fixed = own == "own" or isinstance(source, Captured)
    drawn = _values(mine) if fixed else drawing.draw(mine.values(), np.random.default_rng(seed))
    source_inputs, target_inputs = cases[0] if from_reference else cases[0][::-1]
    if given is not None:
        mapping = from_table(given, mine, theirs, ignore)
    elif hasattr(target, "program"):
        say("inferring the mapping of weights")
        recording = source.record(drawn, source_inputs)
        from parity.models.jax_model import arrays_of
        from parity.pair.inference import Inference

        program, arrays = target.program(target_inputs), arrays_of(target_inputs)
        inference = Inference(recording, mine, drawn, program, theirs, arrays, ignore)
        mapping = complete(with_unused(with_buffers(inference.rows, mine, theirs), mine, theirs), mine, theirs, ignore)
    else:
        by = rows_by_value if isinstance(target, Captured) else rows_by_name
        mapping = complete(by(mine, theirs, ignore), mine, theirs, ignore)
    made = mapping.apply(drawn) if own == "random" else {}
    filled = made | {name: w.value for name, w in theirs.items() if name not in made}
    held = {"reference": drawn, "candidate": filled} if from_reference else {"reference": filled, "candidate": drawn}
    return Comparison(reference, candidate, source, target, cases, mapping, held)


def _values(weights: Map[str, Weight]) -> Arrays:
    return {name: w.value for name, w in weights.items()}


# --- Checks ---


def _run(check: str, comparison: Comparison, found: Report, **options: Any) -> None:
    functions = {
        "weights": _weights,
        "forward": _forward,
        "gradients": _gradients,
        "state": _state,
        "optimizer": _optimizer,
        "loss_curve": _optimizer,
    }
    guarded = measures.guarded(check, lambda: functions[check](check, comparison, found, options), passes=EngineError)
    for result in guarded():
        (found.skipped if isinstance(result, Skipped) else found.results).append(result)


def _weights(check: str, c: Comparison, found: Report, options: dict) -> Iterator[Result]:
    """The mapping is whole, nothing in it is unusual, and (own weights) the tensors are equal."""
    mapping = c.mapping
    roles = ("reference", "candidate") if c.source is c.reference else ("candidate", "reference")
    for role, left in zip(roles, (mapping.source_left, mapping.target_left), strict=True):
        where = (
            f"{', '.join(left[:8])}{', ...' if len(left) > 8 else ''}: list them in ignore= if that is right"
            if left
            else ""
        )
        yield Result(check, f"weights of the {role} without a counterpart", float(len(left)), 0.0, where)
        if left:
            found.hints.append(
                f"{', '.join(left[:8])} of the {role} {'have' if len(left) > 1 else 'has'} no counterpart"
            )
    unusual = mapping.unusual()
    where = "; ".join(
        f"{row.target}: {row.transform} of {', '.join(row.source)}, where its siblings have {usual or 'identity'}"
        for row, usual in unusual
    )
    yield Result(check, "transforms unlike their siblings'", float(len(unusual)), 0.0, where)
    for row, usual in unusual:
        found.hints.append(
            f"{row.target} is {row.source[0]} with {row.transform}, where its siblings have {usual or 'identity'}: a "
            "transposed kernel; confirm with mapping= if it is meant"
        )
    if options["own"]:
        yield from _own_weights(check, c)


def _own_weights(check: str, c: Comparison) -> Iterator[Result]:
    mine, theirs = _values({w.name: w for w in c.source.weights()}), _values({w.name: w for w in c.target.weights()})
    worst, where = 0.0, ""
    for name, made in c.mapping.apply(mine).items():
        difference = measures.relative_to_largest(theirs[name], made)
        if not difference <= worst:
            worst, where = difference, name
    # What was converted went through float32.
    yield Result(check, "own weights, tensor by tensor", worst, 1e-6, where)


def _forward(check: str, c: Comparison, found: Report, options: dict) -> Iterator[Result]:
    for number, (theirs, ours) in enumerate(c.cases):
        case = "outputs" if len(c.cases) == 1 else f"outputs, input {number}"
        b, a = c.reference.run(c.weights["reference"], theirs), c.candidate.run(c.weights["candidate"], ours)
        _same_again(c.reference, c.weights["reference"], theirs, b, "reference")
        _same_again(c.candidate, c.weights["candidate"], ours, a, "candidate")
        pairs = _paired(a, b)
        if not pairs:
            sizes = f"{[list(x.shape) for x in a]} and {[list(x.shape) for x in b]}"
            raise EngineError(
                f"no output of the candidate has as many elements as one of the reference: shapes {sizes}"
            )
        differences = [_difference(a[i], b[j]) for i, j in pairs]
        worst = _worst(differences)
        if worst <= FORWARD:
            yield Result(
                check,
                case,
                worst,
                FORWARD,
                f"{_counted(len(pairs), 'array')}, {sum(a[i].size for i, _ in pairs):,} values",
            )
            continue
        yield from _parted(check, case, c, found, (theirs, ours), (a, b), worst)
    if found.first_divergence is None and options["generate"]:
        yield from _generated(check, c, found)


def _generated(check: str, c: Comparison, found: Report) -> Iterator[Result | Skipped]:
    """Inputs made from the first one, casts lifted: what both models take, both must compute alike."""
    if any(isinstance(m, Captured) for m in (c.reference, c.candidate)):
        return
    taken, refused, worst = [], [], 0.0
    for name, theirs in generated.generate(c.cases[0][0]):
        try:
            ours = _checked(Inputs.of(c.to_candidate(_as_given(theirs)) if c.to_candidate else theirs))
            b = c.reference.run_lifted(c.weights["reference"], theirs)
            a = c.candidate.run_lifted(c.weights["candidate"], ours)
        except Exception:  # a size that one of the models doesn't take is no difference
            refused.append(name)
            continue
        difference = _worst([_same_or(a[i], b[j]) for i, j in _paired(a, b)])
        taken.append(name)
        if not difference <= FORWARD:
            yield Result(check, f"generated input: {name}", difference, FORWARD, "the given inputs don't show it")
            found.hints.append(f"only {name} shows a difference: what decides by size or value differs")
        else:
            worst = max(worst, difference)
    if taken:
        left = f"; not taken by both: {', '.join(refused)}" if refused else ""
        yield Result(check, f"{len(taken)} generated inputs", worst, FORWARD, f"{', '.join(taken)}{left}")


def _as_given(inputs: Inputs) -> Any:
    """In the form in which a user gives inputs."""
    if inputs.keywords:
        return dict(inputs.keywords)
    return inputs.arguments[0] if len(inputs.arguments) == 1 else inputs.arguments


def _same_or(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The difference; none where both have the same values that aren't finite (zeros divided by zeros)."""
    if ours.shape == theirs.shape and not np.isfinite(theirs).all():
        finite = np.isfinite(theirs)
        if np.array_equal(finite, np.isfinite(ours)):
            return _difference(np.where(finite, ours, 0.0), np.where(finite, theirs, 0.0))
    return _difference(ours, theirs)


def _parted(check, case, c: Comparison, found: Report, inputs, outputs, worst: float) -> Iterator[Result]:
    """Outputs differ: whether in what is computed, or only in what is rounded on the way."""
    theirs, ours = inputs
    reference = c.reference.record(c.weights["reference"], theirs)
    candidate = c.candidate.record(c.weights["candidate"], ours)
    a, b = _outputs_of(candidate), _outputs_of(reference)
    pairs = _paired(a, b)
    right = [False] * len(a)
    for i, j in pairs:
        right[i] = _difference(a[i], b[j]) <= FORWARD
    lifted = _worst([_difference(a[i], b[j]) for i, j in pairs])
    if lifted <= FORWARD:
        yield Result(check, f"{case}, casts to narrower types lifted", lifted, FORWARD, _casts(c, inputs))
        yield _rounding(check, case, c, inputs, outputs, (a, b), pairs)
        return
    place = divergence.locate(candidate, reference, right, c.made_of("candidate"))
    if place and found.first_divergence is None:
        found.first_divergence = place
        if hasattr(c.candidate, "program"):
            weights, made_of = c.weights["candidate"], c.made_of("candidate")
            found.causes = causes(c.candidate, weights, ours, reference, place, made_of).in_words()
    if place:
        found.hints += [h for h in hints_of(candidate, reference, place) if h not in found.hints]
    yield Result(check, case, worst, FORWARD, str(place) if place else "")


def _rounding(check, case, c: Comparison, inputs, outputs, truth, pairs) -> Result:
    """Both compute the same. The candidate as it is written may be no further from it than the reference is, as it is
    written or in float32."""
    theirs = inputs[0]
    ours_error = _worst([_difference(outputs[0][i], truth[0][i]) for i, _ in pairs])
    theirs_error = _worst([_difference(outputs[1][j], truth[1][j]) for _, j in pairs])
    narrow = c.reference.run_in_float32(c.weights["reference"], theirs)
    in_float32 = _worst([_difference(narrow[j], truth[1][j]) for _, j in pairs])
    allowed = max(theirs_error, in_float32)
    return Result(
        check,
        f"{case}, as written: the candidate's error over the reference's",
        ours_error / allowed if allowed else math.inf,
        NARROW,
        f"from the float64 truth: candidate {ours_error:.1e}, reference {theirs_error:.1e} (float32 {in_float32:.1e})",
    )


def _casts(c: Comparison, inputs) -> str:
    theirs, ours = inputs
    found = []
    for who, model, given in (("reference", c.reference, theirs), ("candidate", c.candidate, ours)):
        casts = model.narrow_casts(given)
        if casts:
            listed = ", ".join(f"{cast.dtype} at {cast.place}" for cast in casts[:6])
            found.append(f"{who} rounds to {listed}{', ...' if len(casts) > 6 else ''}")
    return "; ".join(found)


def _gradients(check: str, c: Comparison, found: Report, options: dict) -> Iterator[Result | Skipped]:
    theirs, ours = c.cases[0]
    b, a = c.reference.run(c.weights["reference"], theirs), c.candidate.run(c.weights["candidate"], ours)
    pairs = _paired(a, b)
    rng = np.random.default_rng(1)
    cotangents = ([np.zeros(x.shape) for x in a], [np.zeros(x.shape) for x in b])
    for i, j in pairs:
        drawn = rng.standard_normal(b[j].shape)
        cotangents[1][j] = drawn
        axes = layouts.permutation(b[j], a[i], 1e-3)
        cotangents[0][i] = drawn.transpose(axes).reshape(a[i].shape) if axes else drawn.reshape(a[i].shape)
    by_theirs = c.reference.gradients(c.weights["reference"], theirs, cotangents[1])
    by_ours = c.candidate.gradients(c.weights["candidate"], ours, cotangents[0])
    differences = _gradient_differences(c, by_ours[0], by_theirs[0])
    name, worst = max(differences, key=lambda d: math.inf if math.isnan(d[1]) else d[1], default=("", 0.0))
    yield Result(check, f"of {len(differences)} weights", worst, GRADIENTS, f"largest at {name}" if name else "")
    shared = [(x, y) for x, y in zip(by_ours[1].items(), by_theirs[1].items(), strict=False) if x[1].size == y[1].size]
    for (name, ours_), (_, theirs_) in shared:
        yield Result(check, f"of {name}", _difference(ours_, theirs_), GRADIENTS, "")


def _gradient_differences(c: Comparison, ours: Arrays, theirs: Arrays) -> list[tuple[str, float]]:
    """Of every trained weight of the target, under its name."""
    source, target = (theirs, ours) if c.source is c.reference else (ours, theirs)
    largest = max((float(np.abs(g).max(initial=0.0)) for g in source.values()), default=0.0)
    # One tensor of the source may serve several of the target (tied on one side only): their gradients add up.
    several: dict[tuple[str, ...], list] = {}
    for row in c.mapping.rows:
        if row.target in target and all(n in source for n in row.source):
            several.setdefault(row.source, []).append(row)
    found = []
    for names, rows in several.items():
        whole = [r for r in rows if r.transform.can_undo()]
        if len(rows) > 1 and len(whole) == len(rows):
            shape = source[names[0]].shape
            total = sum(r.transform.undo(target[r.target], shape) for r in rows)
            found.append((" + ".join(r.target for r in rows), _norm(total, source[names[0]], largest)))
            continue
        for row in rows:
            made = row.transform.gradient(*(source[n] for n in names))
            found.append((row.target, _norm(target[row.target], made, largest)))
    return found


def _norm(ours: np.ndarray, theirs: np.ndarray, largest: float) -> float:
    """Relative norm of the difference; of gradients that are zero but for rounding, relative to the largest."""
    if np.abs(theirs).max(initial=0.0) <= 1e-12 * largest and np.abs(ours).max(initial=0.0) <= 1e-12 * largest:
        return 0.0
    return measures.relative_norm(ours, theirs)


def _state(check: str, c: Comparison, found: Report, options: dict) -> Iterator[Result | Skipped]:
    if options["mode"] != "train":
        yield Skipped(check, "state changes in training only: give mode='train'")
        return
    theirs, ours = c.cases[0]
    after = {
        "reference": c.reference.state_after(c.weights["reference"], theirs),
        "candidate": c.candidate.state_after(c.weights["candidate"], ours),
    }
    source, target = (
        (after["reference"], after["candidate"])
        if c.source is c.reference
        else (after["candidate"], after["reference"])
    )
    before = c.weights["reference" if c.source is c.reference else "candidate"]
    rows = [r for r in c.mapping.rows if r.target in target and all(n in source for n in r.source)]
    if not rows:
        yield Skipped(check, "no buffer of the two models is mapped to another's")
        return
    for row in rows:
        made = row.transform(*(source[n] for n in row.source))
        difference = measures.relative_norm(target[row.target], made)
        yield Result(check, row.target, difference, GRADIENTS, "")
        if not difference <= GRADIENTS:
            found.hints += _state_hints(row, row.transform(*(before[n] for n in row.source)), made, target[row.target])


def _state_hints(row, before: np.ndarray, theirs: np.ndarray, ours: np.ndarray) -> list[str]:
    """Both move from `before` towards a statistic of the batch; by how much each?"""
    a, b = ours - before, theirs - before
    ratio = float(np.vdot(b, a) / np.vdot(b, b)) if np.vdot(b, b) else math.nan
    if np.allclose(a, ratio * b, rtol=1e-6, atol=1e-12):
        return [
            f"{row.target} moves {ratio:.4g} times as far as the reference's in one step: momentum m of PyTorch is "
            "1 - m of Flax (0.1 there is 0.9 here)"
        ]
    return [
        f"{row.target} differs by more than a factor: PyTorch keeps the unbiased variance (Bessel's correction) in it"
    ]


def _optimizer(check: str, c: Comparison, found: Report, options: dict) -> Iterator[Result | Skipped]:
    if options["optimizer"] is None:
        yield Skipped(check, "no optimizer was given: optimizer=(lambda parameters: torch.optim..., optax...)")
        return
    from parity.pair import training

    yield from training.check(check, c, found, options)


# --- Outputs ---


def _same_again(model: Model, weights: Arrays, inputs: Inputs, first: list[np.ndarray], role: str) -> None:
    again = model.run(weights, inputs)
    for x, y in zip(first, again, strict=True):
        if not np.array_equal(x, y, equal_nan=True):
            raise EngineError(
                f"the {role} gives other outputs when it is called again on the same input: switch off what is random "
                "(dropout, sampling), or keep its random numbers fixed"
            )
    for x in first:
        if np.isnan(x).any():
            raise EngineError(f"the {role} returns NaN on these inputs and weights; compare where it is finite")


def _outputs_of(recording) -> list[np.ndarray]:
    return [np.asarray(recording.values[n]) for n in recording.outputs]


def _paired(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Outputs in their order, those of equal size."""
    left, pairs = list(range(len(ours))), []
    for j, y in enumerate(theirs):
        for i in left:
            if ours[i].size == y.size:
                pairs.append((i, j))
                left.remove(i)
                break
    return pairs


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative to the largest magnitude, axes in the order in which they agree best if the shapes differ."""
    if ours.shape == theirs.shape:
        return measures.relative_to_largest(ours, theirs)
    axes = layouts.permutation(theirs, ours, FORWARD)
    if axes is not None:
        return measures.relative_to_largest(ours, theirs.transpose(axes).reshape(ours.shape))
    squeezed = [theirs.reshape(ours.shape)] if layouts.same_but_ones(ours.shape, theirs.shape) else []
    moved = [theirs.transpose(axes) for axes in layouts.orders(theirs.shape, ours.shape)]
    return min((measures.relative_to_largest(ours, m) for m in (*squeezed, *moved)), default=math.inf)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _worst(differences: Sequence[float]) -> float:
    return math.nan if any(math.isnan(d) for d in differences) else max(differences, default=0.0)
