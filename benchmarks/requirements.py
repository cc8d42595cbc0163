"""Which of this project's packages aren't installed, checked before anything imports one of them.

Imports only the standard library, so that it runs without any of them.
"""

import importlib.metadata
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

_PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

# Modules that every command imports need these.
ESSENTIAL = ("jsonargparse", "PyYAML", "numpy", "ml_dtypes", "rich", "grain", "safetensors")


def declared() -> dict[str, str]:
    """The project's requirements as pyproject.toml states them, by the name of the package."""
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {_name(line): line for line in reversed(lines)}  # what is required counts, not an extra's further demands


def missing(names: Iterable[str]) -> list[str]:
    """The names of those that aren't installed."""
    return [name for name in names if _requires(name) is None]


def missing_below(names: Iterable[str]) -> list[str]:
    """Those that aren't installed, and the missing requirements, direct or not, of the others. A requirement with a
    condition (an environment marker) is left out."""
    requirements = declared()
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys(_missing_below(requirements.get(name, name), set()))
    return list(found)


def pip_command(names: Iterable[str]) -> str:
    """The command that installs them, in the versions that the project requires."""
    requirements = declared()
    return shlex.join(["pip", "install", *(requirements.get(name, name) for name in names)])


def require_or_exit(names: Iterable[str], command: str) -> None:
    """Exit with code 2 and one sentence, as for a UserError, if one of them isn't installed."""
    lacking = missing(names)
    if lacking:
        print(
            f"error: {command} needs packages that aren't installed: {', '.join(lacking)}; {pip_command(lacking)}",
            file=sys.stderr,
        )
        sys.exit(2)


def _missing_below(requirement: str, seen: set[str]) -> Iterator[str]:
    name = _name(requirement)
    if name in seen:
        return
    seen.add(name)
    needs = _requires(name)
    if needs is None:
        yield name
        return
    extras = re.findall(r"[\w-]+", (re.search(r"\[([^\]]*)\]", requirement) or ["", ""])[1])
    for need in needs:
        text, _, marker = need.partition(";")
        extra = re.fullmatch(r"""\s*extra == ["']([^"']+)["']\s*""", marker)
        if not marker or (extra and extra[1] in extras):
            yield from _missing_below(text, seen)


def _requires(name: str) -> list[str] | None:
    """What an installed package requires; None if it isn't installed."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]
