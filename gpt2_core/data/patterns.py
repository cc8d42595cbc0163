"""Files named by a pattern."""

from pathlib import Path

from gpt2_core.errors import UserError

_SPECIAL = "*?["


def matching(pattern: str) -> list[Path]:
    """The files that a pattern with *, ? or [ matches; none where it has none of these. Raises UserError for one that
    can't be read."""
    if not any(character in pattern for character in _SPECIAL):
        return []
    anchor = Path(pattern).anchor
    try:
        return [p for p in Path(anchor or ".").glob(str(Path(pattern).relative_to(anchor))) if p.is_file()]
    except ValueError as error:
        raise UserError(f"{pattern}: not a pattern ({error}); ** stands alone between two slashes") from error
