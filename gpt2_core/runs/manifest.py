"""The checksums of a checkpoint's files: damage is found before anything is resumed from it."""

import hashlib
import json
from pathlib import Path

from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically
from gpt2_core.parsing import json_object

_NAME = "manifest.json"


def write_manifest(checkpoint: Path) -> None:
    """Write size and SHA-256 of every file of a complete checkpoint to a file in it."""
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != _NAME
    }
    write_atomically(checkpoint / _NAME, json.dumps({"files": files}, indent=2) + "\n")


def damage(checkpoint: Path) -> str | None:
    """How a checkpoint differs from its manifest, in a few words; None if it doesn't, or if there is no manifest, as
    in checkpoints of earlier versions."""
    path = checkpoint / _NAME
    if not path.exists():
        return None
    try:
        files = json_object(path.read_bytes(), str(path))["files"]
        for name, expected in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} isn't what was written: its SHA-256 differs from the one in {_NAME}"
    except (OSError, UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{_NAME} can't be read ({error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
