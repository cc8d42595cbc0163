"""What a comparison of two models found."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from parity.engine.evidence import Evidence
from parity.engine.results import Result, Skipped
from parity.pair.divergence import Divergence
from parity.pair.mapping import Mapping


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A weight of the candidate and what of the reference it is."""

    reference: str
    transform: str
    candidate: str
    verified: bool


@dataclasses.dataclass
class Report:
    """The findings of `parity.compare`."""

    names: tuple[str, str]
    """Of the candidate and the reference."""
    table: Mapping = dataclasses.field(repr=False)
    from_reference: bool
    """Whether the mapping leads from the reference to the candidate."""
    results: list[Result] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    first_divergence: Divergence | None = None
    causes: list[str] = dataclasses.field(default_factory=list)
    """What is wrong by itself, a sentence each, the first divergence first."""
    hints: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """What the given inputs and options can't tell, a sentence each."""
    evidence: dict[str, Evidence] = dataclasses.field(default_factory=dict)
    """What is drawn, by names that begin with the check's."""
    mutation_score: Any = None

    @property
    def passed(self) -> bool:
        return self.verdict == "same"

    @property
    def verdict(self) -> str:
        """'same', 'different', or 'inconclusive' where nothing failed and something can't be told."""
        if any(not r.passed for r in self.results):
            return "different"
        return "inconclusive" if self.doubts or not self.results else "same"

    @property
    def doubts(self) -> list[str]:
        """Why a comparison without a difference proves nothing yet."""
        found = list(self.notes)
        forward = [r for r in self.results if r.check == "forward"]
        # Outputs that agree show that the mapping is right: with another one they wouldn't.
        settled = self.table.confirmed or (bool(forward) and all(r.passed for r in forward))
        for row in self.table.rows:
            if row.alternatives and not settled:
                found.append(
                    f"{row.target} may be {' + '.join(row.source)} or {', '.join(row.alternatives)}: give mapping="
                )
        return found

    @property
    def mapping(self) -> list[Mapped]:
        """Every mapped weight, in each model's own names."""
        found = []
        for row in self.table.rows:
            source, target = " + ".join(row.source), row.target
            if not self.from_reference:
                source, target = target, source
            found.append(Mapped(source, str(row.transform), target, row.verified))
        return found

    @property
    def unmapped(self) -> list[str]:
        """Weights of either side without a counterpart."""
        return [*self.table.source_left, *self.table.target_left]

    def mapping_yaml(self) -> str:
        """The mapping as a table to edit and to give back as `mapping=`."""
        return self.table.as_yaml()

    def assert_same(self) -> None:
        """Raises AssertionError that names the first divergence and the hints, unless the verdict is 'same'."""
        __tracebackhide__ = True
        if not self.passed:
            raise AssertionError(self.in_words())

    def in_words(self) -> str:
        verdict = {"same": "the two models are the same", "different": "the two models are different"}
        lines = [verdict.get(self.verdict, "it can't be told whether the two models are the same")]
        for r in self.results:
            if not r.passed:
                where = f": {r.where}" if r.where else ""
                lines.append(f"  {r.check}, {r.case}: {_figure(r.measured)}, limit {_figure(r.limit)}{where}")
        if self.first_divergence:
            d = self.first_divergence
            lines.append(f"  first divergence: candidate {d.candidate}, reference {d.reference}")
        lines += [f"  {c}" for c in self.causes[:5] if len(self.causes) > 1]
        lines += [f"  hint: {h}" for h in self.hints[:5]]
        lines += [f"  {d}" for d in self.doubts[:5]]
        return "\n".join(lines)

    def write(self, folder: str | Path) -> None:
        """The HTML page, report.json and mapping.yaml. Raises EngineError if the folder holds something else."""
        from parity.pair.page import write

        write(Path(folder), self)


def _figure(x: float) -> str:
    return f"{x:.1e}" if math.isfinite(x) and not float(x).is_integer() else str(x)
