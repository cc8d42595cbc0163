"""What a comparison leaves behind: report.json, and the table as text and as a picture."""

import io
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically
from parity.suite import Result


def environment(source: str) -> dict[str, str]:
    """What the figures depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
    return {
        "weights": source,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **{name: version(name) for name in packages},
    }


def open_folder(path: Path) -> None:
    """Make the report's folder; raises UserError if it holds something else or can't be written."""
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "report.json").is_file())):
        raise UserError(f"--report {path}: exists and is not a report; name another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / ".writable", "")
        (path / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--report {path}: can't write there ({error.strerror})") from error


def write(path: Path, results: list[Result], source: str) -> bool:
    """Write the report; returns whether everything passed. No result at all is a failure."""
    passed = bool(results) and all(r.passed for r in results)
    report = {
        "passed": passed,
        "environment": environment(source),
        "checks": [
            {
                "check": r.check,
                "case": r.case,
                "measured": r.measured if math.isfinite(r.measured) else None,
                "limit": r.limit,
                "passed": r.passed,
                "where": r.where,
            }
            for r in results
        ],
    }
    write_atomically(path / "report.json", json.dumps(report, indent=2) + "\n")
    picture = Console(record=True, width=132, file=io.StringIO())
    picture.print(table(results))
    svg = picture.export_svg(title="python parity/compare.py", code_format=_svg_without_web_fonts())
    write_atomically(path / "table.svg", svg)
    return passed


def table(results: list[Result]) -> Table:
    """One row a case."""
    table = Table(title=None, header_style="bold")
    for name in ("check", "case", "measured", "limit", "", "where"):
        table.add_column(name, justify="right" if name in ("measured", "limit") else "left")
    for r in results:
        verdict = "[green]pass[/]" if r.passed else "[bold red]FAIL[/]"
        table.add_row(r.check, r.case, _figure(r.measured), _figure(r.limit), verdict, r.where)
    return table


def _figure(x: float) -> str:
    return f"{x:.0f}" if x.is_integer() else f"{x:.1e}"


def _svg_without_web_fonts() -> str:
    """rich's picture of a terminal, without the fonts it would have a browser fetch."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    start, end = CONSOLE_SVG_FORMAT.index("@font-face"), CONSOLE_SVG_FORMAT.index(".{unique_id}-matrix")
    return CONSOLE_SVG_FORMAT[:start] + CONSOLE_SVG_FORMAT[end:]
