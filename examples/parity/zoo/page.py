"""docs/porting.md, made of measured rows."""

import math
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from . import (
    activations,
    attention,
    convolution,
    embedding,
    interpolation,
    linear,
    losses,
    normalization,
    optimizers,
    pooling,
    recurrent,
)
from .rows import DIFFERENT, EQUAL, Claim, Measured, Row, measure

FAMILIES: list[ModuleType] = [
    linear,
    embedding,
    convolution,
    pooling,
    interpolation,
    normalization,
    attention,
    recurrent,
    activations,
    losses,
    optimizers,
]
PACKAGES = ("torch", "jax", "flax", "equinox", "optax")
VERDICTS: dict[Claim, str] = {
    "equal": "equal as they come",
    "after": "equal after a change",
    "nearly": "close",
    "different": "different",
}

PROSE = Path(__file__).parent / "prose"  # head.md, and a file a family: what the figures don't say


def measure_families(families: list[ModuleType], report=lambda family: None) -> list[tuple[ModuleType, list[Measured]]]:
    """The measured rows of each family, in order; `report` is called before each."""
    measured = []
    for family in families:
        report(family)
        measured.append((family, [measure(row) for row in family.ROWS]))
    return measured


def false_claims(measured: list[tuple[ModuleType, list[Measured]]]) -> list[str]:
    """Rows that measure otherwise than they claim."""
    return [
        f"{row.name}: claimed {VERDICTS[row.claim]!r}, measured {VERDICTS[figures.claim]!r} ({figures})"
        for family, rows in measured
        for row, figures in zip(family.ROWS, rows, strict=True)
        if row.claim != figures.claim
    ]


def render(measured: list[tuple[ModuleType, list[Measured]]]) -> str:
    """The page."""
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in PACKAGES)
    parts = [_prose("head").format(equal=show(EQUAL), different=show(DIFFERENT), versions=versions), _summary(measured)]
    for family, rows in measured:
        parts += [f"## {family.TITLE}\n", _prose(family.FAMILY), _table(family.ROWS, rows)]
    return "\n".join(parts)


def _prose(name: str) -> str:
    return (PROSE / f"{name}.md").read_text(encoding="utf-8")


def _summary(measured: list[tuple[ModuleType, list[Measured]]]) -> str:
    lines = [f"| family | {' | '.join(VERDICTS.values())} |", "|---" * (1 + len(VERDICTS)) + "|"]
    total: Counter[Claim] = Counter()
    for family, rows in measured:
        counts = Counter(figures.claim for figures in rows)
        total += counts
        anchor = family.TITLE.lower().replace(" ", "-")
        lines.append(f"| [{family.TITLE.lower()}](#{anchor}) | {' | '.join(str(counts[name]) for name in VERDICTS)} |")
    lines.append(f"| all | {' | '.join(str(total[name]) for name in VERDICTS)} |")
    return "\n".join(lines) + "\n"


def _table(rows: list[Row], measured: list[Measured]) -> str:
    lines = ["| PyTorch | counterpart | in | as they come | after | verdict |", "|---|---|---|---|---|---|"]
    for row, figures in zip(rows, measured, strict=True):
        cells = (
            _code(row.torch),
            _code(row.counterpart),
            row.framework,
            show(figures.as_it_comes),
            "" if figures.changed is None else show(figures.changed),
            verdict(row, figures),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """As code, unless it is prose with code in it."""
    return text if "`" in text else f"`{text}`"


def verdict(row: Row, figures: Measured) -> str:
    """In words, from what was measured."""
    words = {
        "equal": "equal as they come",
        "after": f"equal after: {row.change}",
        "nearly": f"close, after: {row.change}" if row.change else "close as they come",
        "different": f"different, also after: {row.change}" if row.change else "different",
    }[figures.claim]
    return f"{words}. {row.note[0].upper() + row.note[1:]}" if row.note else words


def show(figure: float) -> str:
    """One significant digit."""
    if math.isnan(figure):
        return "not finite"
    if math.isinf(figure):
        return "shape"
    return re.sub(r"e([+-])0?(\d)", lambda found: "e" + found[1].strip("+") + found[2], f"{figure:.1g}")


def without_digits(page: str) -> str:
    """The page without its figures and versions, which another machine may round otherwise."""
    page = re.sub(r"(?<=\| )(0|\d\d?|\d(\.\d)?e-?\d+|0\.\d+)(?= \|)", "N", page)
    return re.sub(r"\d+\.\d+\.\d+", "N", page)
