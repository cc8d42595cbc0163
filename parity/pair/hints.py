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

    def near(self, recording: Recording, step: Step, most: int = 40) -> Iterator[Step]:
        """The step and those that follow from it, in order."""
        reached, count = {step.number}, 0
        for s in recording.steps:
            if s.number == step.number or reached.intersection(s.sources):
                reached.add(s.number)
                count += 1
                yield s
                if count == most:
                    return

    def behind(self, recording: Recording, step: Step, most: int = 12) -> Iterator[int]:
        """Numbers of values that the step is made of, the nearest first."""
        by_number = {s.number: s for s in recording.steps}
        queue, seen = list(step.sources), set()
        while queue and len(seen) < most:
            number = queue.pop(0)
            if number not in seen:
                seen.add(number)
                yield number
                if number in by_number:
                    queue.extend(by_number[number].sources)


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
    """Sentences, the surest first."""
    if divergence.candidate_step is None:
        return []
    scene = Scene(candidate, reference, divergence.candidate_step, divergence.reference_step)
    with np.errstate(all="ignore"):
        found = [sentence for rule in RULES for sentence in rule(scene)]
    return list(dict.fromkeys(found))


def _activation(scene: Scene) -> Iterator[str]:
    ours = _activation_of(scene.candidate, scene, scene.ours)
    if ours and scene.theirs:
        theirs = _activation_of(scene.reference, scene, scene.theirs)
        if theirs and theirs[0] != ours[0]:
            yield f"the candidate computes {ours[0]}, the reference {theirs[0]}"


def _activation_of(recording: Recording, scene: Scene, step: Step) -> tuple[str, int] | None:
    """The activation function that begins at the step."""
    index = Index((s.number, recording.values[s.number]) for s in scene.near(recording, step)
                  if isinstance(recording.values.get(s.number), np.ndarray))  # fmt: skip
    for number in scene.behind(recording, step, 4):
        x = recording.values.get(number)
        if not isinstance(x, np.ndarray) or fingerprint(x) is None:
            continue
        for name, function in _ACTIVATIONS.items():
            for value in index.find(function(x)):
                if recording.values[value].size == x.size:
                    return name, value
    return None


def _epsilon(scene: Scene) -> Iterator[str]:
    ours = _epsilons(scene.candidate, scene, scene.ours)
    theirs = _epsilons(scene.reference, scene, scene.theirs) if scene.theirs else []
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


def _epsilons(recording: Recording, scene: Scene, step: Step) -> list[tuple[str, float]]:
    """Small constants that are added under or after a square root near the step."""
    by_number = {s.number: s for s in recording.steps}
    found = []
    steps = [step, *(by_number[n] for n in scene.behind(recording, step, 6) if n in by_number)]
    for s in (*steps, *scene.near(recording, step, 8)):
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
                    f"the candidate is sqrt({a}/{b}) times the reference: a scale by the wrong width ({b} in the candidate, "
                    f"{a} in the reference)"
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
    yield f"the candidate is {factor:.6g} times the reference"


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
        numbers = [step.number, *scene.behind(recording, step, 8)]
        for number in numbers:
            sizes |= set(np.shape(recording.values.get(number)))
    for name, weight in scene.reference.weights.items():
        sizes |= set(np.shape(scene.reference.values.get(name, weight)))
    return sorted(sizes)


def _bias(scene: Scene) -> Iterator[str]:
    """A value of one side is that of the other plus a weight."""
    for recording, other, who, step in (
        (scene.reference, scene.candidate, "candidate", scene.theirs),
        (scene.candidate, scene.reference, "reference", scene.ours),
    ):
        if step is None or step.primitive not in ("add", "add_"):
            continue
        index = Index(
            (s.number, other.values[s.number])
            for s in other.steps
            if isinstance(other.values.get(s.number), np.ndarray)
        )
        by_number = {s.number: s for s in recording.steps}
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
                    yield f"along axis {axis} the candidate is one position {way} than the reference: an offset or padding by one"
                    return


def _softmax_axis(scene: Scene) -> Iterator[str]:
    sums = {}
    for who, recording, step in (
        ("candidate", scene.candidate, scene.ours),
        ("reference", scene.reference, scene.theirs),
    ):
        if step is None:
            return
        for s in scene.near(recording, step, 12):
            x = recording.values.get(s.number)
            if isinstance(x, np.ndarray) and x.ndim > 1 and x.dtype.kind == "f" and x.size and x.min() >= 0:
                axes = [a for a in range(x.ndim) if x.shape[a] > 1 and np.allclose(x.sum(axis=a), 1.0, atol=1e-9)]
                if axes:
                    sums[who] = (axes[0] - x.ndim, x.shape)
                    break
    if len(sums) == 2 and sums["candidate"][0] != sums["reference"][0]:
        yield f"softmax is over axis {sums['candidate'][0]} in the candidate and over axis {sums['reference'][0]} in the reference"


def _mask(scene: Scene) -> Iterator[str]:
    """Attention weights that are zero at different positions."""
    found = {}
    for who, recording, step in (
        ("candidate", scene.candidate, scene.ours),
        ("reference", scene.reference, scene.theirs),
    ):
        if step is None:
            return
        for s in scene.near(recording, step, 14):
            x = recording.values.get(s.number)
            if isinstance(x, np.ndarray) and x.ndim >= 2 and x.dtype.kind == "f" and x.size > 3:
                hidden = ~np.isfinite(x) | (x < -1e3) if (x.min() < -1e3 or not np.isfinite(x).all()) else x == 0
                if hidden.any() and not hidden.all() and x.shape[-1] > 1 and x.shape[-2] > 1:
                    found[who] = hidden.reshape(-1, *x.shape[-2:]).all(axis=0)
                    break
    if len(found) == 2:
        a, b = found["candidate"], found["reference"]
        if a.shape == b.shape and not np.array_equal(a, b):
            for k in (1, -1):
                if np.array_equal(a, _shifted(b, k)):
                    yield "the mask is off by one: " + (
                        "the candidate sees one position more"
                        if a.sum() < b.sum()
                        else "the candidate sees one position less"
                    )
                    return
            yield f"the mask hides {int(a.sum())} of {a.size} positions in the candidate and {int(b.sum())} in the reference"
    elif len(found) == 1:
        (who,) = found
        yield f"only the {who} masks positions there"


def _shifted(mask: np.ndarray, k: int) -> np.ndarray:
    """A causal mask with its diagonal moved."""
    n, m = mask.shape
    hidden = [np.argmax(row) if row.any() else m for row in mask]
    return np.array([[j >= h + k for j in range(m)] for h in hidden])


def _kernel(scene: Scene) -> Iterator[str]:
    """A product with a square matrix the other way round."""
    if scene.theirs is None:
        return
    by_number = {s.number: s for s in scene.candidate.steps}
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
    """An operand that plays another's part."""
    if scene.theirs is None or len(scene.ours.sources) < 2 or len(scene.theirs.sources) < 2:
        return
    theirs_steps = {s.number: s for s in scene.reference.steps}
    ours_steps = {s.number: s for s in scene.candidate.steps}
    index = Index((s.number, scene.reference.values[s.number]) for s in scene.reference.steps
                  if isinstance(scene.reference.values.get(s.number), np.ndarray))  # fmt: skip
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
        by_number = {s.number: s for s in recording.steps}
        near = {*scene.behind(recording, step, 40), *(n for s in scene.near(recording, step, 10) for n in s.sources)}
        near |= {n for s in list(near) if s in by_number for n in scene.behind(recording, by_number[s], 20)}
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
        yield "both rotate by the same angles, but rotate other pairs: rotary positions by neighbours (0, 1), (2, 3) and by halves (0, d/2) differ"
    elif width_a != width_b and width_a not in (2 * width_b, width_b // 2):
        yield f"the candidate rotates {width_a} numbers and the reference {width_b}: partial rotary positions"
    else:
        base = np.arcsin(np.clip(a, -1, 1)), np.arcsin(np.clip(b, -1, 1))
        yield f"rotary angles differ (largest sine {np.abs(base[0]).max():.3g} and {np.abs(base[1]).max():.3g}): base, scaling or the first position"


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
    _activation, _epsilon, _kernel, _bias, _softmax_axis, _mask, _factor, _sin_cos, _order, _swapped,
)  # fmt: skip
"""Further rules can be appended: a function of a Scene that yields sentences."""
