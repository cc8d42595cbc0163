"""Cause and consequence told apart: what is wrong by itself, and what only follows from it.

After a divergence the candidate's program goes on with the reference's value, so that the next divergence is one of its
own. Where to go on is found by role: the next operation that combines the wrong value with a weight, on both sides.
"""

import dataclasses
import itertools
from collections.abc import Iterator
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
"""How many places to go on at are tried after each."""


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
    """All of them that can be told: none is looked for behind one where the two models can't be joined again."""
    program, names = model.program(inputs), [w.name for w in model.weights()]
    held = [weights[n] for n in names]
    values = program.run(held, arrays_of(inputs), lifted=True)
    index = Index.of(reference)
    found, following, replaced = [first], [], {}
    while True:
        record = recording(program, values, names, inputs.names())
        trials = [
            (number, value, program.run(held, arrays_of(inputs), lifted=True, replaced=replaced | {number: value}))
            for number, value in itertools.islice(_joints(record, reference, index, found[-1], made_of), JOINTS)
        ]
        agreeing = [_agreeing(program, v, index) for _, _, v in trials]
        if not trials or max(agreeing) <= _agreeing(program, values, index):
            following.append(len(_behind(record, found[-1].candidate_step)) - 1)
            break
        # A weight may be combined with something else first (a norm's scale with its divisor): the right place to join
        # is the one behind which most values agree.
        number, value, after = trials[int(np.argmax(agreeing))]
        replaced[number] = value
        following.append(_changed(values, after))
        values = after
        if len(found) == MOST:
            break
        record = recording(program, values, names, inputs.names())
        computed, expected = outputs.of_recording(record), outputs.of_recording(reference)
        agreeing_outputs = [
            (i, j) for i, j in outputs.paired(computed, expected) if Index([(0, expected[j])]).find(computed[i])
        ]
        place = divergence.locate(record, reference, agreeing_outputs, made_of)
        if (
            place is None
            or place.candidate_step is None
            or place.candidate_step.number <= found[-1].candidate_step.number
        ):
            break
        found.append(place)
    return Causes(found, following)


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
