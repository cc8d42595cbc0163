"""A mapping for a target without a program to follow values in (two PyTorch models): the target runs with a guess by
names and order of use, and the first weight whose product the source doesn't have gets the next candidate."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from parity.models.model import Arrays, Inputs, Model, Recording, Weight
from parity.pair import candidates
from parity.pair.fingerprints import NEAR, Index, evidence
from parity.pair.mapping import Row
from parity.pair.naming import alike
from parity.pair.transforms import Transform

MOST_STEPS = 20
"""That follow from a weight's first use, until a value that the source has must appear."""
MOST_TRIALS = 50
"""Of candidates for one weight; each is a run of the target."""

Candidate = tuple[tuple[str, ...], Transform]


def rows_by_running(
    source: Model,
    target: Model,
    weights: tuple[Mapping[str, Weight], Mapping[str, Weight]],
    held: Arrays,
    given: tuple[Inputs, Inputs],
    ignore: Sequence[str],
) -> list[Row]:
    """A row for each weight of the target that is used; verified are those that values agree with. After a value that
    differs for another reason none do, and names and order decide."""
    mine, theirs = ({n: w for n, w in side.items() if n not in ignore} for side in weights)
    recording = source.record(held, given[0])
    index = Index(evidence(recording))
    own = {n: w.value for n, w in weights[1].items()}
    order = [n for n in target.record(own, given[1]).order_of_use if n in theirs]
    ranked = _Ranking(mine, recording.order_of_use)
    chosen: dict[str, Candidate] = {}
    for place, name in enumerate(order):
        used = {n for names, _ in chosen.values() for n in names}
        free = (c for c in ranked(name, theirs[name].shape, place / len(order)) if used.isdisjoint(c[0]))
        if (best := next(free, None)) is not None:
            chosen[name] = best

    def run(chosen: Mapping[str, Candidate]) -> Recording:
        made = {n: transform(*(held[s] for s in names)) for n, (names, transform) in chosen.items()}
        return target.record(own | made, given[1])

    verified: set[str] = set()
    now = run(chosen)
    for place, name in enumerate(order):
        waiting = set(order[place + 1 :])
        if name not in chosen or not _agrees(now, name, waiting, index):
            for candidate in ranked(name, theirs[name].shape, place / len(order))[:MOST_TRIALS]:
                trial = _exchanged(chosen, name, candidate)
                after = run(trial)
                if _agrees(after, name, waiting, index):
                    chosen, now = trial, after
                    break
            else:
                break  # everything after it differs too
        verified.add(name)
    return [Row(*chosen[n], n, n in verified) for n in order if n in chosen]


class _Ranking:
    """Candidates for a weight, the likeliest by name and order of use first."""

    def __init__(self, source: Mapping[str, Weight], order: Sequence[str]) -> None:
        self._shapes = {n: w.shape for n, w in source.items()}
        self._places = {n: i / len(order) for i, n in enumerate(order)}
        self._groups = candidates.groups({n: w.shape for n, w in source.items() if w.kept})

    def __call__(self, name: str, shape: tuple[int, ...], place: float) -> list[Candidate]:
        def likely(candidate: Candidate) -> float:
            names, transform = candidate
            distance = abs(float(np.mean([self._places.get(n, 1.0) for n in names])) - place)
            return float(np.mean([alike(name, n) for n in names])) - 2.0 * distance - 0.05 * len(transform.steps)

        return sorted(self._fitting(shape), key=likely, reverse=True)

    def _fitting(self, shape: tuple[int, ...]) -> Iterator[Candidate]:
        for n, s in self._shapes.items():
            for kind in (candidates.one_to_one, candidates.part_of, candidates.padded):
                yield from (((n,), transform) for transform in kind(s, shape))
        for names in self._groups:
            yield from ((names, transform) for transform in candidates.of_group(names, self._shapes, shape))


def _exchanged(chosen: Mapping[str, Candidate], name: str, candidate: Candidate) -> dict[str, Candidate]:
    """With this candidate for the weight; the one that had it gets the weight's own."""
    holder = next((n for n, c in chosen.items() if c == candidate and n != name), None)
    changed = {**chosen, name: candidate}
    if holder is not None and name in chosen:
        changed[holder] = chosen[name]
    return changed


def _agrees(recording: Recording, name: str, waiting: Collection[str], index: Index) -> bool:
    """Whether a value that follows from the weight, and from none of those that wait, occurs in the source."""
    unknown = {n for n, weight in recording.weights.items() if weight in waiting}
    reached = {n for n, weight in recording.weights.items() if weight == name}
    count = 0
    for step in recording.steps:
        if unknown.intersection(step.sources):
            unknown.add(step.number)
        elif reached.intersection(step.sources):
            reached.add(step.number)
            value = recording.values.get(step.number)
            if step.number not in recording.from_weights and isinstance(value, np.ndarray):
                if index.find(value, NEAR):
                    return True
                count += 1
        if count == MOST_STEPS:
            break
    return False
