"""The mutation score: how many small changes of the candidate's own program the given inputs would show."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from parity.engine import results as measures
from parity.engine.errors import EngineError
from parity.models.jax_model import arrays_of
from parity.models.model import Inputs
from parity.models.program import read
from parity.pair import inputs as generated
from parity.pair.mutation import Mutant, Runner, mutants


@dataclasses.dataclass(frozen=True)
class Survivor:
    """A change that the inputs don't show."""

    place: str
    story: str
    shown_by: str
    """Which generated input would show it; empty if none does."""


@dataclasses.dataclass(frozen=True)
class MutationScore:
    noticed: int
    survivors: list[Survivor]
    equivalent: int
    """Changes that change no bit of the outputs on any input that was tried, other sizes included."""
    failed: int
    """Changes with which the program can't be evaluated."""

    @property
    def effective(self) -> int:
        """How many of the changes have an effect."""
        return self.noticed + len(self.survivors)

    @property
    def score(self) -> float:
        """The share of changes with an effect that were noticed."""
        return self.noticed / self.effective if self.effective else float("nan")

    def in_words(self) -> list[str]:
        """A sentence for each line of the user's on which changes would pass."""
        by_place = Counter(s.place for s in self.survivors)
        found = []
        for place, count in by_place.most_common():
            shown = sorted({s.shown_by for s in self.survivors if s.place == place and s.shown_by})
            by = f"; {', '.join(shown)} would show" if shown else ""
            changes = f"{count} changes" if count > 1 else "1 change"
            found.append(f"{place or 'a line of a library'}: {changes} to it would pass{by}")
        return found


def mutation_score(comparison: Any, count: int, seed: int, limit: float) -> MutationScore:
    """Of at most `count` changes, drawn at random from all that there are. The candidate must be a JAX model; if it is
    not, the reference is changed in its place."""
    model, role = comparison.candidate, "candidate"
    if not hasattr(model, "program"):
        model, role = comparison.reference, "reference"
    if not hasattr(model, "program"):
        raise EngineError("mutants: neither model is a JAX model, whose program could be changed")
    side = 1 if role == "candidate" else 0
    weights = [comparison.weights[role][w.name] for w in model.weights()]
    runs = [_Run(model, weights, case[side]) for case in comparison.cases]
    more = [(name, _Run(model, weights, given)) for name, given in _others(model, comparison.cases[0][side], seed)]
    every = mutants(runs[0].program, runs[0].values)
    chosen = np.random.default_rng(seed).permutation(len(every))[:count]
    noticed, survivors, equivalent, failed = 0, [], 0, 0
    for i in chosen:
        mutant = every[i]
        effects = [run.effect(mutant) for run in runs]
        if effects[0] is None:
            failed += 1
        elif any(e is not None and not e <= limit for e in effects):
            noticed += 1
        else:
            others = [(name, run.effect(mutant)) for name, run in more]
            shown = next((name for name, e in others if e is not None and not e <= limit), "")
            if not shown and all(not e for e in (*effects, *(e for _, e in others)) if e is not None):
                equivalent += 1
            else:
                survivors.append(Survivor(mutant.place, mutant.story, shown))
    return MutationScore(noticed, survivors, equivalent, failed)


class _Run:
    """One evaluation of the program, to which changed ones are compared."""

    def __init__(self, model: Any, weights: list[np.ndarray], given: Inputs) -> None:
        self.program = model.program(given)
        self.values = self.program.run(weights, arrays_of(given), lifted=True)
        self._runner = Runner(self.program, self.values)
        self._outputs = [read(x, self.values) for x in self.program.outputs]

    def effect(self, mutant: Mutant) -> float | None:
        """The largest relative change of an output; None if it can't be evaluated here."""
        operations = self.program.operations
        if mutant.position >= len(operations):
            return None
        here = operations[mutant.position]
        if (here.primitive, here.place) != (mutant.original.primitive, mutant.original.place):
            return None
        try:
            changed = self._runner.changed(mutant.at(here, self.values))
        except Exception:
            return None
        if changed is None:
            return None
        outputs = self._runner.outputs(changed)
        return max((_change(a, b) for a, b in zip(outputs, self._outputs, strict=True)), default=0.0)


def _change(a: np.ndarray, b: np.ndarray) -> float:
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite):
        return float("inf")
    return measures.relative_to_largest(np.where(finite, a, 0.0), np.where(finite, b, 0.0))


def _others(model: Any, given: Inputs, seed: int):
    """Generated inputs that the model can be traced with."""
    for name, inputs in generated.generate(given, seed):
        try:
            model.program(inputs)
        except EngineError:
            continue
        yield name, inputs
