"""The first divergence of two models: the first value, in order of computation, that only one of them has.

Values are found on the other side by their elements, whatever the layout. Two correct programs needn't share every
value (one squares and subtracts, the other subtracts and squares); what isn't shared is no difference as long as
everything that is made of it is. The first value for which that fails is the first divergence.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np

from parity.models.model import Recording, Step
from parity.pair import layouts
from parity.pair.fingerprints import CLOSE, Index, evidence, fingerprint


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first value of each side that the other doesn't have."""

    reference: str
    candidate: str
    difference: float
    """Relative to the largest magnitude; infinite where the sizes differ."""
    lines: list[str]
    """The candidate's lines that can be the cause, the likeliest first."""
    agreeing: int
    """How many computed values agree before it."""
    candidate_step: Step | None = dataclasses.field(default=None, repr=False, compare=False)
    reference_step: Step | None = dataclasses.field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return (
            f"{self.candidate} differs from {self.reference} of the reference by {self.difference:.1e}; "
            f"{self.agreeing} values before it agree"
        )


class _Side:
    """One recording, and what is known of its values."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.values = recording, recording.values
        self.by_number = recording.by_number
        self.users: dict[int, list[Step]] = defaultdict(list)
        for step in recording.steps:
            for source in step.sources:
                self.users[source].append(step)
        self.from_data = set(recording.inputs) | set(recording.weights)
        if not recording.inputs:  # a function that makes tensors of its input by itself
            self.from_data |= {s.number for s in recording.steps if not s.sources}
        for step in recording.steps:
            if any(s in self.from_data for s in step.sources):
                self.from_data.add(step.number)
        self.index = Index(evidence(recording))
        self.matches: dict[int, list[int]] = {}
        self.agreed: set[int] = set()
        self.right: set[int] = set()

    def match(self, other: "_Side", close: float) -> None:
        """Find which values the other side has, and which follow from such by moving numbers."""
        self.agreed = set(self.recording.weights) | set(self.recording.inputs)
        for step in self.recording.steps:
            value = self.values.get(step.number)
            found = other.index.find(value, close) if isinstance(value, np.ndarray) else []
            if found:
                self.matches[step.number] = found
                self.agreed.add(step.number)
                continue
            moved = step.layout or not isinstance(value, np.ndarray) or fingerprint(value) is None
            if moved and all(s in self.agreed for s in step.sources):
                self.agreed.add(step.number)

    def settle(self, right_outputs: set[int]) -> None:
        """Values that agree, or whose every use does."""
        outputs = set(self.recording.outputs)
        self.right = set(self.recording.weights) | set(self.recording.inputs)
        for step in reversed(self.recording.steps):
            n = step.number
            if n in outputs:
                fine = n in right_outputs
            else:
                users = self.users[n]
                fine = n in self.agreed or (bool(users) and all(u.number in self.right for u in users))
            if fine:
                self.right.add(n)

    def frontier(self) -> list[Step]:
        """Wrong values that are computed from right ones, in order."""
        used = self._used()
        found = []
        for step in self.recording.steps:
            if step.number in self.right or step.number not in self.from_data or step.number not in used:
                continue
            if all(s in self.right or s not in self.from_data for s in step.sources):
                found.append(step)
        return found

    def _used(self) -> set[int]:
        used = set(self.recording.outputs)
        for step in reversed(self.recording.steps):
            if step.number in used:
                used.update(step.sources)
        return used

    def origins(self, step: Step) -> list[tuple[int, list[Step]]]:
        """Of each operand the value that it is by moving numbers alone, and the steps that move them."""
        return [self._origin(s) for s in step.sources]

    def _origin(self, number: int) -> tuple[int, list[Step]]:
        chain = []
        while (step := self.by_number.get(number)) is not None and step.layout and step.sources:
            chain.append(step)
            number = next((s for s in step.sources if s in self.from_data), step.sources[0])
        return number, chain

    def made_of(self, number: int) -> list[Step]:
        """The steps behind a value that doesn't depend on the inputs: a table, a mask."""
        found, queue = [], [number]
        while queue:
            step = self.by_number.get(queue.pop())
            if step is not None and step not in found:
                found.append(step)
                queue.extend(step.sources)
        return found


def locate(
    candidate: Recording,
    reference: Recording,
    agreeing: Collection[tuple[int, int]],
    weights: dict[str, Sequence[str]],
    close: float = CLOSE,
) -> Divergence | None:
    """The first divergence; None if every output of the candidate agrees. `agreeing` are the pairs of outputs that are
    equal, `weights` says which of the reference's weights each of the candidate's is made of, `close` how near two
    values' fingerprints are that are one."""
    right = {i for i, _ in agreeing}
    if len(right) == len(candidate.outputs):
        return None
    ours, theirs = _Side(candidate), _Side(reference)
    ours.match(theirs, close)
    theirs.match(ours, close)
    ours.settle({candidate.outputs[i] for i in right})
    theirs.settle({reference.outputs[j] for _, j in agreeing})
    fronts = ours.frontier(), theirs.frontier()
    if not fronts[0]:
        return _of_outputs(ours, theirs, min(set(range(len(candidate.outputs))) - right))
    step = fronts[0][0]
    before = sum(s.number in ours.matches for s in candidate.steps if s.number < step.number)
    operands = _operands(ours, step, weights)
    partner = _partner(theirs, fronts[1], operands)
    lines = _lines(ours, theirs, step, partner, operands)
    return Divergence(
        str(partner) if partner else "nothing that it computes",
        str(step),
        _difference(ours, theirs, step, partner),
        lines,
        before,
        step,
        partner,
    )


def _of_outputs(ours: _Side, theirs: _Side, which: int) -> Divergence:
    """All values agree, and this output is another one of them or has another order."""
    number = ours.recording.outputs[which]
    step = ours.by_number.get(number)
    theirs_number = theirs.recording.outputs[min(which, len(theirs.recording.outputs) - 1)]
    partner = theirs.by_number.get(theirs_number)
    chain = [step, *ours._origin(number)[1]] if step else []
    lines = list(dict.fromkeys(s.place for s in chain if s and s.place))
    difference = _difference(ours, theirs, step, partner) if step and partner else math.inf
    return Divergence(
        str(partner),
        f"{step}, an output with other values or in another order",
        difference,
        lines,
        len(ours.matches),
        step,
        partner,
    )


Operand = tuple[set, list[Step], int]


def _operands(ours: _Side, step: Step, weights: dict[str, Sequence[str]]) -> list[Operand]:
    """Of each operand: what it is in the reference, the steps that move its numbers, its own number."""
    found = []
    for number, chain in ours.origins(step):
        if number in ours.recording.weights:
            names = weights.get(ours.recording.weights[number], ())
            found.append(({("weight", n) for n in names}, chain, number))
        elif number in ours.recording.inputs:
            found.append(({("input", list(ours.recording.inputs).index(number))}, chain, number))
        else:
            found.append((set(ours.matches.get(number, ())), chain, number))
    return found


def _identity(theirs: _Side, number: int) -> object:
    if number in theirs.recording.weights:
        return "weight", theirs.recording.weights[number]
    if number in theirs.recording.inputs:
        return "input", list(theirs.recording.inputs).index(number)
    return number


def _identities(theirs: _Side, step: Step) -> set:
    """Everything that an operand of the step is on its way through layouts."""
    found = set()
    for source in step.sources:
        number, chain = theirs._origin(source)
        found |= {_identity(theirs, number), *(s.number for s in chain)}
    return found


def _partner(theirs: _Side, front: list[Step], operands: list[Operand]) -> Step | None:
    """The reference's wrong value that is made of most of the same."""

    def shared(step: Step) -> int:
        identities = _identities(theirs, step)
        return sum(bool(what & identities) for what, _, _ in operands)

    return max(front, key=lambda s: (shared(s), -s.number), default=None)


def _lines(ours: _Side, theirs: _Side, step: Step, partner: Step | None, operands: list[Operand]) -> list[str]:
    identities = _identities(theirs, partner) if partner else set()
    foreign, moved, tables = [], [], []
    for what, chain, number in operands:
        if number not in ours.from_data:
            made = ours.made_of(number)
            # If the reference lacks values of a table, the first of them; otherwise any step behind it may be it.
            lacking = [s for s in made if s.number not in ours.agreed]
            tables += _first_of(ours, lacking) or made
            continue
        moved += chain
        if partner and what and not what & identities and number in ours.by_number:
            foreign.append(ours.by_number[number])
            moved += ours._origin(number)[1]
    suspects = [*foreign, step, *moved, *tables]
    if partner and step.primitive_kind != partner.primitive_kind:
        # An operation that the candidate doesn't have belongs after its operand, which may be some way back.
        suspects += [ours.by_number[n] for _, _, n in operands if n in ours.by_number]
        suspects += _makers_of_shared(ours, step, identities)
    if all(what & identities for what, _, n in operands if n in ours.from_data) and moved and partner:
        # The same operands and the same kind of operation: it is how they are laid out.
        suspects = [step, *moved, *tables]
    return list(dict.fromkeys(s.place for s in suspects if s.place))


def _first_of(ours: _Side, steps: list[Step]) -> list[Step]:
    """Those that are made of none of the others."""
    numbers = {s.number for s in steps}
    return [s for s in steps if not numbers.intersection(s.sources)]


def _makers_of_shared(ours: _Side, step: Step, identities: set, most: int = 16) -> list[Step]:
    """The nearest steps behind this one that make, or only move, an operand of the partner."""
    queue, seen = list(step.sources), set()
    while queue and len(seen) < most:
        number = queue.pop(0)
        made = ours.by_number.get(number)
        if made is None or number in seen:
            continue
        seen.add(number)
        if identities.intersection(ours.matches.get(number, ())):
            return [made, *ours._origin(number)[1]]
        queue.extend(made.sources)
    return []


def _last_of_line(side: _Side, step: Step) -> Step:
    """The last step that follows from this one by the same call on the same line."""
    while True:
        same = [u for u in side.users[step.number] if (u.place, u.caller) == (step.place, step.caller)]
        if not same or same[-1].number <= step.number:
            return step
        step = same[-1]


def _difference(ours: _Side, theirs: _Side, step: Step, partner: Step | None) -> float:
    if partner is None:
        return math.inf
    if step.primitive_kind != partner.primitive_kind:
        # Two forms of one function begin otherwise: what their last operations give can be compared.
        step, partner = _last_of_line(ours, step), _last_of_line(theirs, partner)
    a, b = ours.values[step.number], theirs.values.get(partner.number)
    if b is None or np.size(a) != np.size(b):
        return math.inf
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    # In the order of axes in which they are nearest; where none fits, elements in order of size.
    pairs = [(a, m) for m in layouts.moved(b, a.shape)] or [(np.sort(np.ravel(a)), np.sort(np.ravel(b)))]
    return min(float(np.abs(x - y).max() / (np.abs(y).max() or 1.0)) for x, y in pairs)
