"""Causes and consequences: which divergences are wrong by themselves, and which follow from earlier ones.

After a divergence the candidate's program continues with the reference's value, so that the next divergence is no
consequence of it. The place to continue from is found by role: the next operation that combines the wrong value with a
weight, on both sides.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity.models.jax_model import JaxModel, arrays_of, recording
from parity.models.model import Arrays, Inputs, Recording, Step
from parity.models.program import Program
from parity.pair import divergence, outputs
from parity.pair.divergence import Divergence
from parity.pair.fingerprints import Index
from parity.pair.layouts import Layouts

MOST = 12
"""How many divergences are looked for."""
JOINTS = 3
"""How many places to continue from are tried after each."""


@dataclasses.dataclass(frozen=True)
class Causes:
    """Divergences that aren't consequences of earlier ones, in order, and how many values follow from each."""

    found: list[Divergence]
    following: list[int]

    def in_words(self) -> list[str]:
        return [
            f"{d.candidate} is wrong by itself; {count} later values differ because of it"
            for d, count in zip(self.found, self.following, strict=True)
        ]


def causes(
    model: JaxModel, weights: Arrays, inputs: Inputs, reference: Recording, first: Divergence, made_of: dict[str, Any]
) -> Causes:
    """All that can be found: none is looked for after one from which no value of the reference can be used."""
    program, names = model.program(inputs), [w.name for w in model.weights()]
    held, given = [weights[n] for n in names], arrays_of(inputs)
    index = Index.of(reference)

    def trial(replaced: dict[int, np.ndarray]) -> _Trial:
        values = program.run(held, given, lifted=True, replaced=replaced)
        record = recording(program, values, names, inputs.names())
        return _Trial(replaced, values, record, _agreeing(program, values, index))

    found, following, now = [first], [], trial({})
    while True:
        after = _joined(now, found[-1], reference, index, made_of, trial)
        if after is None:
            following.append(len(_behind(now.record, found[-1].candidate_step)) - 1)
            break
        following.append(_changed(now.values, after.values))
        now, place = after, after.divergence(reference, made_of)
        seen = {d.candidate_step.number for d in found}
        if len(found) == MOST or place is None or place.candidate_step is None or place.candidate_step.number in seen:
            break
        found.append(place)
    return Causes(found, following)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The candidate's program with some of the reference's values in place of its own."""

    replaced: dict[int, np.ndarray]
    values: dict[int, Any]
    record: Recording
    agreeing: int
    """How many of its values occur in the reference."""

    def divergence(self, reference: Recording, made_of: dict[str, Any]) -> Divergence | None:
        computed, expected = outputs.of_recording(self.record), outputs.of_recording(reference)
        agreeing = [
            (i, j) for i, j in outputs.paired(computed, expected) if Index([(0, expected[j])]).find(computed[i])
        ]
        return divergence.locate(self.record, reference, agreeing, made_of)


def _joined(
    now: _Trial,
    place: Divergence,
    reference: Recording,
    index: Index,
    made_of: dict[str, Any],
    trial: Callable[[dict[int, np.ndarray]], _Trial],
) -> _Trial | None:
    """The program that continues with the reference's value after this divergence; None if there is no place for it.

    A weight may be combined with something else first (a norm's scale with its divisor): after a wrong place the
    models differ at once. The first after which they don't is taken, because a later one may hide what is wrong in
    another branch; else the one behind which most values agree.
    """
    better: list[_Trial] = []
    for number, value in itertools.islice(_joints(now.record, reference, index, place, made_of), JOINTS):
        after = trial(now.replaced | {number: value})
        if after.agreeing <= now.agreeing:
            continue
        following = after.divergence(reference, made_of)
        step = following.candidate_step if following else None
        if step is not None and step.number == place.candidate_step.number:
            continue  # the same divergence again: something else depends on it
        if step is None or step not in _behind(after.record, after.record.by_number[number]):
            return after
        better.append(after)
    return max(better, key=lambda t: t.agreeing, default=None)


def _joints(
    ours: Recording, theirs: Recording, index: Index, place: Divergence, made_of: dict[str, Any]
) -> Iterator[tuple[int, np.ndarray]]:
    """The next values of the candidate whose counterpart is known by its weight, and that counterpart in its layout."""
    if place.candidate_step is None or place.reference_step is None:
        return
    layouts = _layouts(ours, theirs, index)
    after = _behind(ours, place.candidate_step)
    uses = {
        (name, step.primitive_kind): step for step, name in _weighted(theirs, _behind(theirs, place.reference_step))
    }
    for step, name in _weighted(ours, after):
        for source in made_of.get(name, ()):
            partner = uses.get((source, step.primitive_kind))
            if partner is None:
                continue
            x, y = ours.values[step.number], theirs.values.get(partner.number)
            if y is None or x.size != y.size:
                continue
            laid_out = layouts.apply(y, x.shape)
            if laid_out is not None:
                yield step.number, laid_out


def _behind(recording: Recording, first: Step) -> list[Step]:
    """The step and everything that depends on it."""
    reached, found = {first.number}, [first]
    for step in recording.steps:
        if reached.intersection(step.sources):
            reached.add(step.number)
            found.append(step)
    return found


def _weighted(recording: Recording, steps: list[Step]):
    """Those of the steps that combine data with a weight, and its name."""
    origin = dict(recording.weights)
    for step in recording.steps:
        if step.layout and len(step.sources) == 1 and step.sources[0] in origin:
            origin[step.number] = origin[step.sources[0]]
    for step in steps:
        if not step.layout:
            for source in step.sources:
                if source in origin:
                    yield step, origin[source]


def _layouts(ours: Recording, theirs: Recording, index: Index) -> Layouts:
    """Orders of axes, from values that agree."""
    layouts = Layouts()
    for step in ours.steps:
        value = ours.values.get(step.number)
        if isinstance(value, np.ndarray) and value.ndim > 1 and not step.layout:
            for number in index.find(value)[:1]:
                layouts.learn(theirs.values[number], value)
    return layouts


def _changed(before: dict[int, Any], after: dict[int, Any]) -> int:
    """How many values the substitution changed."""
    return sum(isinstance(x, np.ndarray) and not np.array_equal(x, after[n]) for n, x in before.items())


def _agreeing(program: Program, values: dict[int, Any], index: Index) -> int:
    """How many values of the program occur in the reference."""
    computed = (values[x] for operation in program.operations for x in operation.outputs)
    return sum(bool(index.find(x)) for x in computed if isinstance(x, np.ndarray))
