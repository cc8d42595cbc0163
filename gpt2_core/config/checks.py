"""Checks of settings, whose errors name the option as it is typed."""

import math
from typing import Any

from gpt2_core.errors import UserError


def refuse_unless(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that some random generator doesn't accept."""
    refuse_unless(0 <= seed < 1 << 32, f"--seed {seed}: must be from 0 to {(1 << 32) - 1}")


def require_positive(group: str, config: Any, *names: str) -> None:
    """Raise UserError unless these settings are 1 or more; `group` is the prefix of their options ("model.")."""
    for name in names:
        value = getattr(config, name)
        refuse_unless(value >= 1, f"--{group}{name} {value}: must be 1 or more")


def require_nonnegative(group: str, config: Any, *names: str) -> None:
    """Raise UserError unless these settings are finite and 0 or greater."""
    for name in names:
        value = getattr(config, name)
        refuse_unless(math.isfinite(value) and value >= 0, f"--{group}{name} {value}: must be 0 or greater")


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def one_of(numbers: list[int]) -> str:
    """The numbers as "1, 2, 4 or 8"; the middle of a long list is left out."""
    words = [str(n) for n in numbers]
    if len(words) > 8:
        words = [*words[:4], "...", *words[-3:]]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
