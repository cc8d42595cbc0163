"""The report of a comparison of two models as files: index.html, report.json, mapping.yaml."""

import math
import os
import sys
from pathlib import Path
from typing import Any

from parity.engine import report as pages
from parity.engine.report import Section
from parity.pair.report import Report

RESTS_ON = {
    "forward": ("weights",),
    "gradients": ("forward",),
    "state": ("forward",),
    "optimizer": ("gradients",),
    "loss_curve": ("optimizer",),
}
"""Which check explains the failures of which."""


def write(folder: Path, found: Report) -> None:
    """Raises EngineError if the folder holds something else or can't be written."""
    pages.open_folder(folder)
    pages.write(folder, _as_page(found))
    temporary = folder / f".mapping.yaml.{os.getpid()}.tmp"
    temporary.write_text(found.mapping_yaml(), encoding="utf-8")
    temporary.replace(folder / "mapping.yaml")


def _as_page(found: Report) -> pages.Report:
    divergence = found.first_divergence
    page = pages.Report(found.names, "weights as the mapping below says", " ".join(sys.argv), RESTS_ON)
    page.results, page.skipped, page.evidence = found.results, found.skipped, found.evidence
    if found.verdict == "inconclusive":
        page.conclusion = "inconclusive: " + "; ".join(found.doubts or ["nothing was compared"])
    page.sections = [
        s for s in (_divergence(divergence), _causes(found), _hints(found), _mapping(found), _mutants(found)) if s
    ]
    page.details = {
        "first_divergence": divergence
        and {
            "reference": divergence.reference,
            "candidate": divergence.candidate,
            "difference": divergence.difference if math.isfinite(divergence.difference) else None,
            "lines": divergence.lines,
        },
        "causes": found.causes,
        "hints": found.hints,
        "mapping": [
            {"reference": m.reference, "transform": m.transform, "candidate": m.candidate} for m in found.mapping
        ],
        "unmapped": found.unmapped,
        "mutation_score": _score(found),
    }
    return page


def _divergence(d: Any) -> Section | None:
    if d is None:
        return None
    text = f"The first value, in order of computation, that only one model has; {d.agreeing} values before it agree."
    return Section(
        "First divergence",
        text,
        ["candidate", "reference", "the candidate's lines"],
        [[d.candidate, d.reference, ", ".join(d.lines)]],
    )


def _causes(found: Report) -> Section | None:
    text = (
        "After each divergence the candidate continues with the reference's value, so that the next is no consequence."
    )
    return Section("Causes", text, ["cause"], [[c] for c in found.causes]) if len(found.causes) > 1 else None


def _hints(found: Report) -> Section | None:
    return Section("What it usually is", "", ["hint"], [[h] for h in found.hints]) if found.hints else None


def _mapping(found: Report) -> Section:
    text = "mapping.yaml has it as a table to edit and to give back as mapping=."
    if found.unmapped:
        text += f" Without a counterpart: {', '.join(found.unmapped)}."
    rows = [[m.reference, m.transform, m.candidate, "values" if m.verified else "names"] for m in found.mapping]
    return Section("Mapping of the weights", text, ["reference", "transform", "candidate", "decided by"], rows)


def _mutants(found: Report) -> Section | None:
    score = found.mutation_score
    if score is None:
        return None
    text = (
        f"Of {score.effective} small changes of the program that have an effect, these inputs show {score.noticed}; "
        f"{score.equivalent} others change no bit on any input that was tried."
    )
    return Section(
        "What this comparison would miss", text, ["changes that would pass"], [[w] for w in score.in_words()]
    )


def _score(found: Report) -> dict[str, Any] | None:
    score = found.mutation_score
    if score is None:
        return None
    return {
        "score": score.score if math.isfinite(score.score) else None,
        "noticed": score.noticed,
        "equivalent": score.equivalent,
        "survivors": [{"place": s.place, "change": s.story, "shown_by": s.shown_by} for s in score.survivors],
    }
