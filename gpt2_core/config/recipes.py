"""The recipes that come with this project, by name.

Their folder is a clone's `configs`; `gpt2_core/recipes` is a link to it, so that they are package data once installed.
"""

import difflib
import re
from pathlib import Path

from gpt2_core.errors import UserError

FOLDER = Path(__file__).parents[1] / "recipes"
DEFAULT = "quickstart"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(given: str) -> Path:
    """The file that `--config` names: by its path, or by the name of a recipe that comes with this project."""
    if Path(given).is_file():
        return Path(given)
    if given in names():
        return FOLDER / f"{given}.yaml"
    close = difflib.get_close_matches(Path(given).stem, names(), n=1)
    meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(names())}"
    raise UserError(f"--config {given}: no such file, and no recipe of that name; {meant}")


def text(name: str) -> str:
    """What a recipe says; raises UserError for a name that there isn't."""
    if name not in names():
        raise UserError(f"{name}: no such recipe; there are {', '.join(names())}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def about(name: str) -> str:
    """What a recipe trains: the first paragraph of its header."""
    header = re.match(r"(?:#.*\n)+", text(name))[0]
    return " ".join(re.sub(r"^# ?", "", header, flags=re.M).partition("\n\n")[0].split())
