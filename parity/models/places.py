"""Lines of code as they are named to the user."""

from collections.abc import Sequence
from pathlib import Path


def is_library(file: str, libraries: Sequence[str]) -> bool:
    _, packages, inside = file.rpartition("-packages/")
    return bool(packages) and inside.partition("/")[0] in libraries


def short_place(file: str, line: int) -> str:
    """The path from the current folder, or within an installed package, or the file with its folder; and the line."""
    _, packages, inside = file.rpartition("-packages/")
    if packages:
        return f"{inside}:{line}"
    path = Path(file)
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(*path.parts[-2:])
    return f"{here}:{line}"
