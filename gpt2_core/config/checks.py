"""Checks of settings, whose errors name the option as it is typed."""

import math
from typing import Any

from gpt2_core.errors import UserError

# Whole numbers up to here are exact in float64, in which lengths, rates and sizes are computed.
LARGEST = 1 << 53


def refuse_unless(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that some random generator doesn't accept."""
    refuse_unless(0 <= seed < 1 << 32, f"--seed {in_short(seed)}: must be from 0 to {(1 << 32) - 1}")


def require_positive(group: str, config: Any, *names: str) -> None:
    """Raise UserError unless these settings are 1 to LARGEST; `group` is the prefix of their options ("model.")."""
    for name in names:
        value = getattr(config, name)
        _refuse_unless_within(f"--{group}{name}", value, value >= 1, "must be 1 or more")


def require_nonnegative(group: str, config: Any, *names: str) -> None:
    """Raise UserError unless these settings are finite and 0 or greater, and no whole number beyond LARGEST."""
    for name in names:
        value = getattr(config, name)
        _refuse_unless_within(f"--{group}{name}", value, value >= 0, "must be 0 or greater")


def require_above_zero(group: str, config: Any, *names: str) -> None:
    """Raise UserError unless these settings are finite and above 0; one that is None isn't given."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _refuse_unless_within(f"--{group}{name}", value, value > 0, "must be above 0 and finite")


def _refuse_unless_within(option: str, value: float, condition: bool, message: str) -> None:
    """Raise UserError unless the condition holds, and the value is finite, and no whole number beyond LARGEST."""
    refuse_unless(condition and value < math.inf, f"{option} {in_short(value)}: {message}")
    is_exact = isinstance(value, float) or value <= LARGEST
    refuse_unless(is_exact, f"{option} {in_short(value)}: must be at most {LARGEST}")


def in_short(value: Any) -> str:
    """A value as an error repeats it. Python refuses to write a number of thousands of digits."""
    if isinstance(value, int) and abs(value) > LARGEST**4:
        return f"(a number of about {int(value.bit_length() * math.log10(2)) + 1} digits)"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
