"""Lines of code as they are named to the user."""

import sys
from collections.abc import Sequence
from pathlib import Path


def is_library(file: str, libraries: Sequence[str]) -> bool:
    _, packages, inside = file.rpartition("-packages/")
    return bool(packages) and inside.partition("/")[0] in libraries


def notebook_cell(file: str) -> str:
    """`In[3]`, if the file stands for a cell of a notebook, as a traceback names it there; else nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    if not shell or not hasattr(shell.compile, "format_code_name"):  # IPython before 8.12 lacks it
        return ""
    _, cell = shell.compile.format_code_name(file) or ("", "")
    return cell


def short_place(file: str, line: int) -> str:
    """The cell of a notebook, or the path from the current folder, or within an installed package, or the file with its
    folder; and the line."""
    if cell := notebook_cell(file):
        return f"{cell}:{line}"
    _, packages, inside = file.rpartition("-packages/")
    if packages:
        return f"{inside}:{line}"
    path = Path(file)
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(*path.parts[-2:])
    return f"{here}:{line}"
