"""What a difference usually is: the known mistakes of porting, recognised by recomputing them on the values at hand.

Each rule is given the values at the divergence and says in a sentence what it sees, or nothing.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from scipy import special

from parity.models.model import Recording, Step
from parity.pair.divergence import Divergence
from parity.pair.fingerprints import CLOSE, Index, fingerprint

LIMIT = 1e-9
"""Relative: below, a formula explains a value."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """The divergence with everything around it."""

    candidate: Recording
    reference: Recording
    ours: Step
    theirs: Step | None


def _near(recording: Recording, step: Step, most: int = 40) -> Iterator[Step]:
    """The step and those that follow from it, in order."""
    reached, count = {step.number}, 0
    for s in recording.steps:
        if s.number == step.number or reached.intersection(s.sources):
            reached.add(s.number)
            count += 1
            yield s
            if count == most:
                return


def _behind(recording: Recording, step: Step, most: int = 12) -> Iterator[int]:
    """Numbers of values that the step is made of, the nearest first."""
    queue, seen = list(step.sources), set()
    while queue and len(seen) < most:
        number = queue.pop(0)
        if number not in seen:
            seen.add(number)
            yield number
            if number in recording.by_number:
                queue.extend(recording.by_number[number].sources)


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exact GELU (erf)": lambda x: 0.5 * x * (1 + special.erf(x / np.sqrt(2))),
    "GELU by tanh": _gelu_tanh,
    "GELU by a sigmoid (x * sigmoid(1.702 x))": lambda x: x * special.expit(1.702 * x),
    "SiLU": lambda x: x * special.expit(x),
    "ReLU": lambda x: np.maximum(x, 0),
    "ReLU squared": lambda x: np.square(np.maximum(x, 0)),
    "leaky ReLU with slope 0.01": lambda x: np.where(x > 0, x, 0.01 * x),
    "leaky ReLU with slope 0.2": lambda x: np.where(x > 0, x, 0.2 * x),
    "ELU": lambda x: np.where(x > 0, x, np.expm1(x)),
    "softplus": lambda x: np.logaddexp(x, 0),
    "tanh": np.tanh,
    "a sigmoid": special.expit,
    "a hard sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "ReLU6": lambda x: np.clip(x, 0, 6),
}


def hints(candidate: Recording, reference: Recording, divergence: Divergence) -> list[str]:
    """Sentences, the most certain first."""
    if divergence.candidate_step is None:
        return []
    scene = Scene(candidate, reference, divergence.candidate_step, divergence.reference_step)
    with np.errstate(all="ignore"):
        found = [sentence for rule in RULES for sentence in rule(scene)]
    return list(dict.fromkeys(found))


def _activation(scene: Scene) -> Iterator[str]:
    ours = _activation_of(scene.candidate, scene.ours)
    if ours and scene.theirs:
        theirs = _activation_of(scene.reference, scene.theirs)
        if theirs and theirs[0] != ours[0]:
            yield f"the candidate computes {ours[0]}, the reference {theirs[0]}"


def _activation_of(recording: Recording, step: Step) -> tuple[str, int] | None:
    """The activation function that begins at the step."""
    index = Index.of(recording, _near(recording, step))
    for number in _behind(recording, step, 4):
        x = recording.values.get(number)
        if not isinstance(x, np.ndarray) or fingerprint(x) is None:
            continue
        for name, function in _ACTIVATIONS.items():
            for value in index.find(function(x)):
                if recording.values[value].size == x.size:
                    return name, value
    return None


def _epsilon(scene: Scene) -> Iterator[str]:
    ours = _epsilons(scene.candidate, scene.ours)
    theirs = _epsilons(scene.reference, scene.theirs) if scene.theirs else []
    for form, a in ours:
        for other, b in theirs:
            if form == other and abs(a - b) > 1e-3 * max(abs(a), abs(b)):
                yield f"epsilon is {_plain(a)} in the candidate and {_plain(b)} in the reference"
                return
    for form, a in ours:
        for other, b in theirs:
            if form != other and abs(a - b) <= 1e-3 * max(a, b):
                yield f"epsilon {_plain(a)} is added {form} in the candidate and {other} in the reference"
                return


def _epsilons(recording: Recording, step: Step) -> list[tuple[str, float]]:
    """Small constants that are added under or after a square root near the step."""
    by_number, found = recording.by_number, []
    steps = [step, *(by_number[n] for n in _behind(recording, step, 6) if n in by_number)]
    for s in (*steps, *_near(recording, step, 8)):
        if s.primitive not in ("add", "max", "maximum", "clamp_min", "add_"):
            continue
        value = recording.values.get(s.number)
        for source in s.sources:
            x = recording.values.get(source)
            if (
                not isinstance(x, np.ndarray)
                or not isinstance(value, np.ndarray)
                or x.shape != value.shape
                or not x.size
            ):
                continue
            added = value - x
            if added.size > 1 and 0 < np.abs(added).max() < 0.1 and np.ptp(added) <= 1e-6 * np.abs(added).max() + 1e-15:
                made = by_number.get(source)
                form = "after the square root" if made and made.primitive == "sqrt" else "under the square root"
                found.append((form, float(np.median(added))))
    return list(dict.fromkeys(found))


def _plain(x: float) -> str:
    return f"{x:.2g}"


def _factor(scene: Scene) -> Iterator[str]:
    pair = _pair(scene)
    if pair is None:
        return
    ours, theirs = pair
    factor = _constant_factor(ours, theirs)
    if factor is None:
        return
    for n in _widths(scene):
        if n > 1 and _equal(factor, n / (n - 1)):
            yield f"the candidate's variance is divided by {n - 1}, the reference's by {n}: Bessel's correction"
            return
        if n > 1 and _equal(factor, (n - 1) / n):
            yield f"the candidate's variance is divided by {n}, the reference's by {n - 1}: Bessel's correction"
            return
    for a in _widths(scene):
        for b in _widths(scene):
            if a != b and _equal(factor, np.sqrt(a / b)):
                yield (
                    f"the candidate is sqrt({a}/{b}) times the reference: a scale by the wrong width ({b} in the "
                    f"candidate, {a} in the reference)"
                )
                return
        for name, value in (
            (f"sqrt({a})", np.sqrt(a)),
            (f"1/sqrt({a})", 1 / np.sqrt(a)),
            (str(a), a),
            (f"1/{a}", 1 / a),
        ):
            if a > 1 and _equal(factor, value):
                yield f"the candidate is {name} times the reference: a scale that only one of them applies"
                return
    yield f"the candidate is {factor:.{6 if abs(factor - 1) > 1e-4 else 12}g} times the reference"


def _constant_factor(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    if ours.size != theirs.size or ours.size < 2:
        return None
    a, b = np.sort(np.ravel(ours)), np.sort(np.ravel(theirs))
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or not np.vdot(b, b):
        return None
    factor = float(np.linalg.norm(a) / np.linalg.norm(b))
    for signed in (factor, -factor):
        b_sorted = np.sort(signed * b)
        if np.abs(a - b_sorted).max() <= LIMIT * np.abs(a).max() and abs(signed - 1) > LIMIT:
            return signed
    return None


def _widths(scene: Scene) -> list[int]:
    sizes = set()
    for recording, step in ((scene.candidate, scene.ours), (scene.reference, scene.theirs)):
        if step is None:
            continue
        numbers = [step.number, *_behind(recording, step, 8)]
        for number in numbers:
            sizes |= set(np.shape(recording.values.get(number)))
    return sorted(sizes)


def _bias(scene: Scene) -> Iterator[str]:
    """A value of one side is that of the other plus a weight."""
    for recording, other, who, step in (
        (scene.reference, scene.candidate, "candidate", scene.theirs),
        (scene.candidate, scene.reference, "reference", scene.ours),
    ):
        if step is None or step.primitive not in ("add", "add_"):
            continue
        index = Index.of(other)
        by_number = recording.by_number
        for a, b in (step.sources[:2], step.sources[:2][::-1]) if len(step.sources) >= 2 else ():
            name = _weight_behind(recording, by_number, a)
            value = recording.values.get(b)
            if name and isinstance(value, np.ndarray) and index.find(value):
                yield f"{name} is not added in the {who}"
                return


def _weight_behind(recording: Recording, by_number: dict[int, Step], number: int) -> str | None:
    while number not in recording.weights:
        step = by_number.get(number)
        if step is None or not step.layout or len(step.sources) != 1:
            return None
        number = step.sources[0]
    return recording.weights[number]


def _order(scene: Scene) -> Iterator[str]:
    """The same elements elsewhere."""
    pair = _pair(scene)
    if pair is None or pair[0].size != pair[1].size:
        return
    ours, theirs = pair
    if ours.shape == theirs.shape:
        for axis in range(ours.ndim):
            for shift in (1, -1):
                moved = np.roll(theirs, shift, axis)
                inner = [slice(None)] * ours.ndim
                inner[axis] = slice(1, -1)
                if ours.shape[axis] > 3 and _close(ours[tuple(inner)], moved[tuple(inner)]):
                    way = "later" if shift == 1 else "earlier"
                    yield f"along axis {axis} the candidate is one position {way} than the reference: an offset by one"
                    return


def _softmax_axis(scene: Scene) -> Iterator[str]:
    sums = {}
    for who, recording, step in (
        ("candidate", scene.candidate, scene.ours),
        ("reference", scene.reference, scene.theirs),
    ):
        if step is None:
            return
        for s in _near(recording, step, 12):
            x = recording.values.get(s.number)
            if isinstance(x, np.ndarray) and x.ndim > 1 and x.dtype.kind == "f" and x.size and x.min() >= 0:
                axes = [a for a in range(x.ndim) if x.shape[a] > 1 and np.allclose(x.sum(axis=a), 1.0, atol=1e-9)]
                if axes:
                    sums[who] = (axes[0] - x.ndim, x.shape)
                    break
    if len(sums) == 2 and sums["candidate"][0] != sums["reference"][0]:
        ours, theirs = sums["candidate"][0], sums["reference"][0]
        yield f"softmax is over axis {ours} in the candidate and over axis {theirs} in the reference"


def _mask(scene: Scene) -> Iterator[str]:
    """Attention scores or weights that are hidden at different positions."""
    found = {}
    for who, recording, step in (
        ("candidate", scene.candidate, scene.ours),
        ("reference", scene.reference, scene.theirs),
    ):
        if step is None:
            return
        for s in _near(recording, step, 14):
            hidden = _hidden(recording.values.get(s.number))
            if hidden is not None:
                found[who] = hidden
                break
    if len(found) == 1:
        (who,) = found
        yield f"only the {who} masks positions there"
    if len(found) < 2 or found["candidate"].shape != found["reference"].shape:
        return
    a, b = found["candidate"], found["reference"]
    differing = np.argwhere(a != b)
    if not len(differing):
        return
    if len(set(differing[:, 1] - differing[:, 0])) == 1 and len(differing) > 1:
        more = "fewer" if a.sum() > b.sum() else "more"
        yield f"the mask is off by one: along one diagonal the candidate sees {more} positions than the reference"
    else:
        yield f"the mask hides {a.sum()} of {a.size} positions in the candidate and {b.sum()} in the reference"


def _hidden(x: np.ndarray | None) -> np.ndarray | None:
    """The positions that a mask hides in scores (very negative there) or in attention weights (zero there)."""
    if not isinstance(x, np.ndarray) or x.ndim < 2 or x.dtype.kind != "f" or min(x.shape[-2:]) < 2:
        return None
    hidden = ~np.isfinite(x) | (x < -1e3)
    if not hidden.any() and x.min() == 0.0 and np.allclose(x.sum(-1), 1.0, atol=1e-9):
        hidden = x == 0.0
    if not hidden.any() or hidden.all():
        return None
    return hidden.reshape(-1, *x.shape[-2:]).all(axis=0)


def _kernel(scene: Scene) -> Iterator[str]:
    """A product with a square matrix that is transposed in one of the two."""
    if scene.theirs is None:
        return
    by_number = scene.candidate.by_number
    if scene.ours.primitive not in ("dot_general", "mm", "matmul"):
        return
    theirs = scene.reference.values.get(scene.theirs.number)
    for source in scene.ours.sources:
        name = _weight_behind(scene.candidate, by_number, source)
        if name is None:
            continue
        weight = scene.candidate.values[source]
        others = [s for s in scene.ours.sources if s != source]
        if weight.ndim == 2 and weight.shape[0] == weight.shape[1] and others:
            x = scene.candidate.values[others[0]]
            index = Index([(0, theirs)]) if isinstance(theirs, np.ndarray) else None
            if index and any(index.find(x @ w) for w in (weight, weight.T)):
                yield f"{name} is transposed in one of the two: a square kernel keeps its shape either way"


def _swapped(scene: Scene) -> Iterator[str]:
    """An operand in another one's place."""
    if scene.theirs is None or len(scene.ours.sources) < 2 or len(scene.theirs.sources) < 2:
        return
    theirs_steps = scene.reference.by_number
    ours_steps = scene.candidate.by_number
    index = Index.of(scene.reference)
    found = []
    for source in scene.ours.sources[:2]:
        value = scene.candidate.values.get(source)
        if isinstance(value, np.ndarray):
            found.append((source, index.find(value)))
    partners = {n for s in scene.theirs.sources for n in _chain(theirs_steps, s)}
    foreign = [(s, m) for s, m in found if m and not partners.intersection(m)]
    shared = [(s, m) for s, m in found if m and partners.intersection(m)]
    if len(foreign) == 1 and shared:
        source, matched = foreign[0]
        made, there = ours_steps.get(source), theirs_steps.get(matched[0])
        missing = [
            s for s in scene.theirs.sources if not any(s in _chain_all(theirs_steps, s2) for _, m in shared for s2 in m)
        ]
        instead = theirs_steps.get(missing[0]) if missing else None
        if made and there:
            yield f"the candidate uses {made} here" + (f", where the reference uses {instead}" if instead else "")


def _elsewhere(scene: Scene) -> Iterator[str]:
    """The same operation on different values that both models have."""
    if scene.theirs is None or _kind_of(scene.ours) != _kind_of(scene.theirs):
        return
    ours = scene.candidate.by_number
    theirs = scene.reference.by_number
    x = scene.candidate.values.get(scene.ours.sources[0]) if scene.ours.sources else None
    y = scene.reference.values.get(scene.theirs.sources[0]) if scene.theirs.sources else None
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray) or x.size != y.size:
        return
    if Index([(0, y)]).find(x) or fingerprint(x) is None or fingerprint(y) is None:
        return
    there = Index.of(scene.reference).find(x)
    here = Index.of(scene.candidate).find(y)
    if there and here:
        a = ours.get(scene.ours.sources[0])
        b = theirs.get(scene.theirs.sources[0])
        yield (
            f"the candidate applies this to {a or 'an input'}, the reference to {b or 'an input'}, and both have both "
            "values: swapped halves, gates or operands"
        )


def _kind_of(step: Step) -> str:
    return step.caller or step.primitive


def _flattened(scene: Scene) -> Iterator[str]:
    """A product whose input has each row's numbers in another order."""
    if scene.theirs is None:
        return
    for a in scene.ours.sources[:2]:
        for b in scene.theirs.sources[:2]:
            x, y = scene.candidate.values.get(a), scene.reference.values.get(b)
            if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray) or x.ndim < 2 or x.shape != y.shape:
                continue
            if x.dtype.kind == "f" and not _close(x, y) and _close(np.sort(x, -1), np.sort(y, -1)):
                yield (
                    "the last axis holds the same numbers in another order: flattened as height, width, channels "
                    "(NHWC) in one model and as channels, height, width (NCHW) in the other, or heads reordered"
                )
                return


def _chain(steps: dict[int, Step], number: int) -> list[int]:
    found = [number]
    while (step := steps.get(number)) is not None and step.layout and step.sources:
        number = step.sources[0]
        found.append(number)
    return found


def _chain_all(steps: dict[int, Step], number: int) -> list[int]:
    return [number, *(s.number for s in steps.values() if number in _chain(steps, s.number))]


def _sin_cos(scene: Scene) -> Iterator[str]:
    """Rotary positions: pairs of neighbours or of halves, one sign or the other, an offset."""
    ours, theirs = scene.ours, scene.theirs
    if theirs is None:
        return
    tables = {}
    for who, recording, step in (("candidate", scene.candidate, ours), ("reference", scene.reference, theirs)):
        by_number = recording.by_number
        near = {*_behind(recording, step, 40), *(n for s in _near(recording, step, 10) for n in s.sources)}
        near |= {n for s in list(near) if s in by_number for n in _behind(recording, by_number[s], 20)}
        tables[who] = {
            by_number[n].primitive: recording.values[n]
            for n in near
            if n in by_number and by_number[n].primitive in ("sin", "cos")
        }
    if not all("sin" in t and "cos" in t for t in tables.values()):
        return
    a, b = tables["candidate"]["sin"], tables["reference"]["sin"]
    width_a, width_b = a.shape[-1], b.shape[-1]
    half = {tuple(np.round(np.unique(np.abs(x)), 9)) for x in (a, b)}
    if len(half) == 1:
        yield (
            "both rotate by the same angles, and other pairs: rotary positions by neighbours (0, 1), (2, 3) in one, by "
            "halves (0, d/2) in the other"
        )
    elif width_a != width_b and width_a not in (2 * width_b, width_b // 2):
        yield f"the candidate rotates {width_a} numbers and the reference {width_b}: partial rotary positions"
    else:
        largest = f"{np.abs(a).max():.3g} and {np.abs(b).max():.3g}"
        yield f"rotary angles differ (largest sine {largest}): base, scaling or the first position"


def _padding(scene: Scene) -> Iterator[str]:
    """A convolution or pooling that pads its two ends otherwise."""
    if scene.theirs is None or "conv" not in scene.ours.primitive + scene.theirs.primitive:
        return
    pair = _pair(scene)
    if pair is None:
        return
    if pair[0].size != pair[1].size:
        shapes = f"{pair[0].shape} in the candidate and {pair[1].shape} in the reference"
        yield f"a convolution gives the shape {shapes}: padding or stride"
        return
    same = np.intersect1d(np.round(pair[0].ravel(), 9), np.round(pair[1].ravel(), 9)).size
    yield (
        f"a convolution of the same weights gives other values ({same} of {pair[0].size} occur in both): padding (SAME "
        "pads the end more where a stride doesn't divide; PyTorch's number pads both ends alike), stride, dilation "
        "or a flipped kernel"
    )


def _pair(scene: Scene) -> tuple[np.ndarray, np.ndarray] | None:
    if scene.theirs is None:
        return None
    a, b = scene.candidate.values.get(scene.ours.number), scene.reference.values.get(scene.theirs.number)
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.dtype.kind != "f":
        return None
    return a, b


def _equal(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * abs(b)


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max(initial=0.0) <= CLOSE * max(1e-30, np.abs(b).max(initial=0.0)))


RULES: tuple[Callable[[Scene], Iterator[str]], ...] = (
    _activation, _epsilon, _kernel, _bias, _softmax_axis, _mask, _factor, _sin_cos, _order, _flattened, _swapped,
    _elsewhere, _padding,
)  # fmt: skip
"""Further rules can be appended: a function of a Scene that yields sentences."""
