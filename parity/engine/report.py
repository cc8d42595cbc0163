"""The files of a comparison: report.json, index.html, the table and the plots as pictures."""

import base64
import dataclasses
import io
import json
import math
import os
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity.engine.errors import EngineError
from parity.engine.evidence import Coverage, Curves, Depth, Errors, Evidence, Texts
from parity.engine.results import Result, Skipped, explanation

LOWEST, HIGHEST = -17, 1  # of the bars' scale, in powers of ten


@dataclasses.dataclass(frozen=True)
class Section:
    """A further table of the page."""

    title: str
    text: str
    columns: list[str]
    rows: list[list[str]]


@dataclasses.dataclass
class Report:
    """Everything a run of a suite found."""

    names: tuple[str, str]
    """Of the candidate and the reference."""
    weights: str
    """Where the weights come from."""
    command: str
    """What was typed."""
    rests_on: Mapping[str, Collection[str]]
    """Of each check the checks that explain its failures."""
    cannot_see: Collection[str] = ()
    """What no check of the suite looks at, a sentence each."""
    results: list[Result] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    faults: list[Any] = dataclasses.field(default_factory=list)
    """Verdicts on planted mistakes, where they were asked for."""
    evidence: dict[str, Evidence] = dataclasses.field(default_factory=dict)
    """What the checks left to be drawn, by names that begin with theirs."""
    conclusion: str = ""
    """The verdict in place of the one made from the results: where nothing failed and something can't be told."""
    sections: list[Section] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further entries of report.json."""

    def add(self, answer: Any) -> None:
        """What a task answered: results and skipped cases of a check, or the verdict on a fault."""
        if not isinstance(answer, list):
            self.faults.append(answer)
            return
        for result in answer:
            (self.skipped if isinstance(result, Skipped) else self.results).append(result)

    @property
    def passed(self) -> bool:
        """Whether everything that ran passed; nothing at all is a failure."""
        return (
            not self.conclusion
            and bool(self.results)
            and all(r.passed for r in self.results)
            and all(v.in_place for v in self.faults)
        )

    @property
    def verdict(self) -> str:
        if self.conclusion:
            return self.conclusion
        if not self.results:
            return "nothing was compared"
        failed = sum(not r.passed for r in self.results)
        if failed:
            return f"{failed} of {len(self.results)} cases FAILED"
        missed = [v.fault.name for v in self.faults if not v.in_place]
        if missed:
            return f"{len(missed)} mistakes not caught in their place: {', '.join(missed)}"
        proof = f", and all {len(self.faults)} planted mistakes were caught in their place" if self.faults else ""
        return f"the two are the same model{proof}"

    @property
    def explanation(self) -> str:
        """Where to look first, if something failed."""
        return explanation(self.results, self.rests_on)


def open_folder(path: Path) -> None:
    """Make the report's folder; raises EngineError if it holds something else or can't be written."""
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "report.json").is_file())):
        raise EngineError(f"--report {path}: exists and is not a report; name another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write(path / ".writable", "")
        (path / ".writable").unlink()
    except OSError as error:
        raise EngineError(f"--report {path}: can't write there ({error.strerror})") from error


def write(path: Path, report: Report) -> None:
    """Write the report's files into the folder."""
    facts = environment(report.weights)
    _write(path / "report.json", json.dumps(_as_json(report, facts), indent=2, allow_nan=False) + "\n")
    picture = Console(markup=False, record=True, width=150, file=io.StringIO())
    picture.print(table(report.results))
    svg = picture.export_svg(title=" ".join(report.command.split()[:2]), code_format=_svg_without_web_fonts())
    _write(path / "table.svg", svg)
    plots = _plots(report.evidence, report.names)
    for plot in plots:
        _write(path / f"{plot['file']}.png", plot["png"])
    _write(path / "index.html", _page(report, facts, plots))


def _write(path: Path, content: bytes | str) -> None:
    """A whole file: a reader finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def environment(source: str) -> dict[str, str]:
    """What the figures depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
    installed = {name: _version(name) for name in packages}
    return {
        "weights": source,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **{name: number for name, number in installed.items() if number},
    }


def _version(package: str) -> str:
    """Empty if it isn't installed: a comparison needs the frameworks of its two models only."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _as_json(report: Report, facts: dict[str, str]) -> dict[str, Any]:
    return {
        "passed": report.passed,
        "verdict": report.verdict,
        "explanation": report.explanation,
        "environment": facts,
        "checks": [
            {
                "check": r.check,
                "case": r.case,
                "measured": r.measured if math.isfinite(r.measured) else None,
                "limit": r.limit,
                "passed": r.passed,
                "where": r.where,
            }
            for r in report.results
        ],
        "skipped": [dataclasses.asdict(s) for s in report.skipped],
        "faults": [
            {
                "name": v.fault.name,
                "check": v.fault.check,
                "place": v.fault.place,
                "caught": v.caught,
                "in_place": v.in_place,
                "orders": v.orders if math.isfinite(v.orders) else None,
                "where": v.where,
            }
            for v in report.faults
        ],
        **report.details,
    }


def table(results: list[Result]) -> Table:
    """One row a case."""
    table = Table(header_style="bold")
    for name in ("check", "case", "measured", "limit", "", "where"):
        table.add_column(name, justify="right" if name in ("measured", "limit") else "left")
    for r in results:
        verdict = Text("pass", "green") if r.passed else Text("FAIL", "bold red")
        # Text, because what an exception says may look like rich's markup.
        table.add_row(r.check, Text(r.case), figure(r.measured), figure(r.limit), verdict, Text(r.where))
    return table


def figure(x: float) -> str:
    if not math.isfinite(x):
        return str(x)
    return f"{x:.0f}" if float(x).is_integer() else (f"{x:.2f}" if 0.01 <= abs(x) < 1000 else f"{x:.1e}")


def _page(report: Report, facts: dict[str, str], plots: list[dict]) -> str:
    template = Environment(autoescape=True).from_string((files("parity.engine") / "report.html").read_text())
    rows = [
        {
            "check": r.check,
            "case": r.case,
            "measured": figure(r.measured),
            "limit": figure(r.limit),
            "passed": r.passed,
            "where": r.where,
            "bar": _on_scale(r.measured, r.limit),
            "mark": _on_scale(r.limit, r.limit) if r.limit > 0 else None,
        }
        for r in report.results
    ]
    faults = [
        {
            "name": v.fault.name,
            "check": v.fault.check,
            "caught": v.caught,
            "in_place": v.in_place,
            "orders": "exact" if math.isinf(v.orders) else f"{v.orders:.1f}",
            "where": v.where,
            "story": v.fault.story,
        }
        for v in report.faults
    ]
    caught = sum(v.in_place for v in report.faults)
    return template.render(
        passed=report.passed,
        verdict=report.verdict[0].upper() + report.verdict[1:],
        explanation=report.explanation,
        environment=facts,
        counts=f"{len(report.results)} cases of {len({r.check for r in report.results})} checks",
        rows=rows,
        skipped=report.skipped,
        plots=[p | {"data": base64.b64encode(p["png"]).decode()} for p in plots],
        names=report.names,
        texts=[{"name": _label(name), "texts": texts} for name, texts in _left(report.evidence, Texts)],
        pairs=next((coverage for _, coverage in _left(report.evidence, Coverage)), None),
        faults=faults,
        classes=_by_check(report.faults),
        cannot_see=report.cannot_see,
        sections=report.sections,
        faults_verdict=f"{caught} of {len(faults)} planted mistakes were caught, each by its check and at its place.",
        command=report.command,
    )


def _by_check(verdicts: list[Any]) -> list[dict[str, Any]]:
    """A row for each check: how many mistakes were planted for it, caught, and by how much at least."""
    rows = []
    for check in dict.fromkeys(v.fault.check for v in verdicts):
        found = [v for v in verdicts if v.fault.check == check]
        least = min(v.orders for v in found)
        margin = "exact" if math.isinf(least) else f"{least:.1f}"
        rows.append({"check": check, "planted": len(found), "caught": sum(v.in_place for v in found), "orders": margin})
    return rows


def _on_scale(x: float, limit: float) -> float:
    """In percent: relative differences by their powers of ten, ratios and logarithms (limits of 1 and more) as they
    are, up to one and a half times the limit."""
    if not math.isfinite(x):
        return 100.0
    if limit >= 1.0:
        return round(100 * min(1.0, max(0.0, x / (1.5 * limit))), 1)
    power = math.log10(x) if x > 0 else LOWEST
    return round(100 * min(1.0, max(0.0, (power - LOWEST) / (HIGHEST - LOWEST))), 1)


def _left(evidence: Mapping[str, Evidence], kind: type[Evidence]) -> list[tuple[str, Any]]:
    return [(name, left) for name, left in evidence.items() if isinstance(left, kind)]


def _label(name: str) -> str:
    """What follows the check's name in a name of evidence."""
    return name.partition(" ")[2]


def _plots(evidence: Mapping[str, Evidence], names: tuple[str, str]) -> list[dict]:
    """PNGs of what the checks left, with a title and a sentence each."""
    plots = []
    for file, curves in _left(evidence, Curves):
        text = (
            "Both trainers' losses, and below how far apart they are. The grey line is "
            f"{names[1]} against itself, started from weights changed in their last digit: how rounding alone grows."
        )
        plots.append({"file": file, "title": "Loss curves", "text": text, "png": _draw_curves(curves, names)})
    for file, depth in _left(evidence, Depth):
        text = "Relative difference of every value, in the order it is computed; the dashed line is the limit."
        plots.append({"file": file, "title": depth.title, "text": text, "png": _draw_depth(depth)})
    if errors := _left(evidence, Errors):
        text = (
            f"Each dot is a tensor: {names[1]}'s error against the float64 truth, and {names[0]}'s. On the line they "
            "are equal."
        )
        file = errors[0][0].partition(" ")[0]
        pairs = {_label(name): kind.points for name, kind in errors}
        plots.append({"file": file, "title": "Precision", "text": text, "png": _draw_precision(pairs, names)})
    return plots


def _png(figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def _draw_curves(curves: Curves, names: tuple[str, str]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    ours, theirs, nudged = curves.candidate, curves.reference, curves.nudged
    above.plot(ours, color="tab:blue", linewidth=3, alpha=0.5, label=names[0])
    above.plot(theirs, color="tab:orange", linewidth=1, label=names[1])
    above.set_ylabel("loss")
    above.legend(frameon=False)
    floor = 1e-17  # so that equal losses can be drawn on a log axis
    below.semilogy(np.abs(nudged - theirs) + floor, color="0.6", linewidth=1, label=f"{names[1]} from 1e-16 away")
    below.semilogy(np.abs(ours - theirs) + floor, color="tab:blue", linewidth=1, label=" - ".join(names))
    below.axhline(curves.limit, color="black", linestyle="--", linewidth=1, label="limit")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    below.legend(frameon=False, ncols=3)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    return _png(figure)


def _draw_depth(depth: Depth) -> bytes:
    from matplotlib.figure import Figure

    found = depth.differences
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    axis.semilogy([max(difference, 1e-17) for _, difference in found], marker=".", linewidth=1, color="tab:blue")
    axis.axhline(depth.limit, color="black", linestyle="--", linewidth=1)
    every = max(1, len(found) // 24)
    axis.set_xticks(range(0, len(found), every), [name for name, _ in found][::every], rotation=90, fontsize=7)
    axis.set_ylabel("relative difference")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    return _png(figure)


def _draw_precision(pairs: dict[str, list[tuple[float, float]]], names: tuple[str, str]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axis = figure.subplots()
    for name, points in pairs.items():
        ours, theirs = zip(*points, strict=True)
        axis.loglog(theirs, ours, marker="o", markersize=4, linestyle="", alpha=0.7, label=name)
    ends = axis.get_xlim()
    axis.plot(ends, ends, color="black", linewidth=1)
    axis.set_xlabel(f"{names[1]}'s error")
    axis.set_ylabel(f"{names[0]}'s error")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return _png(figure)


def _svg_without_web_fonts() -> str:
    """rich's picture of a terminal, without the fonts it would have a browser fetch."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    start, end = CONSOLE_SVG_FORMAT.index("@font-face"), CONSOLE_SVG_FORMAT.index(".{unique_id}-matrix")
    return CONSOLE_SVG_FORMAT[:start] + CONSOLE_SVG_FORMAT[end:]
