"""Text, JSON and YAML from files that anybody may have edited or damaged: what is wrong with one is a UserError.

Nothing else parses such a file (`tests/test_architecture.py`), because every parser has errors of several types, some
easily forgotten: text that isn't UTF-8, nesting deeper than Python's recursion, numbers of thousands of digits.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from gpt2_core.errors import UserError, reason


def read_text(path: Path, source: str | None = None) -> str:
    """The UTF-8 text of a file; raises UserError, beginning with `source` (the path, if left out)."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{source or path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source or path}: not UTF-8 text (byte {error.start})") from error


def json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in `text`; raises UserError, beginning with `source`, if it isn't one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} isn't JSON ({reason(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{source} isn't a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; raises UserError."""
    return json_object(read_text(path), str(path))


def yaml_value(text: str, source: str) -> Any:
    """What a YAML text holds; raises UserError, beginning with `source`, if it isn't YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # ValueError and those after it: dates that don't exist, numbers that are too long, tags without their value.
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
