"""Write the notebooks from the scripts that they are kept as: python notebooks/make.py"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
SCRIPTS = sorted((FOLDER / "scripts").glob("*.py"))


def notebook(script: Path) -> str:
    """The notebook of a Jupytext script, without outputs; the same text every time."""
    made = jupytext.read(script)
    del made.metadata["jupytext"]
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # left to Jupytext, it would be a random one
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    for script in SCRIPTS:
        (FOLDER / f"{script.stem}.ipynb").write_text(notebook(script), encoding="utf-8")
