"""Pairwise coverage: few rows of a table of options in which every two values of two options meet.

Most faults of software need one or two options to show (Kuhn, Wallace & Gallo 2004, "Software fault interactions and
implications for software testing"); the greedy construction is AETG's (Cohen et al. 1997).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

Row = dict[str, str]
"""A value for every option."""
Pair = frozenset[tuple[str, str]]
"""Two options, each with one of its values."""


def all_pairs(table: Mapping[str, Sequence[str]]) -> list[Pair]:
    """Every two values of two different options, in the order of the table."""
    choices = [[(option, value) for value in values] for option, values in table.items()]
    return [frozenset(pair) for a, b in itertools.combinations(choices, 2) for pair in itertools.product(a, b)]


def pairs_of(rows: Iterable[Row]) -> set[Pair]:
    """The pairs that meet in at least one of the rows."""
    return {frozenset(pair) for row in rows for pair in itertools.combinations(row.items(), 2)}


def covering_rows(table: Mapping[str, Sequence[str]]) -> list[Row]:
    """Rows that cover all pairs, each chosen greedily to cover many that no row before it has. Among equals the value
    that the table names first is taken: the first row has every option at its first value."""
    pairs, rows = all_pairs(table), []
    missing = set(pairs)
    while missing:
        # Every row begins with a pair that is missing, so that each covers one at least.
        chosen: Row = dict(next(pair for pair in pairs if pair in missing))
        while len(chosen) < len(table):
            gains = {
                (option, value): sum(frozenset({(option, value), other}) in missing for other in chosen.items())
                for option, values in table.items()
                if option not in chosen
                for value in values
            }
            option, value = max(gains, key=gains.__getitem__)
            chosen[option] = value
        rows.append({option: chosen[option] for option in table})
        missing -= pairs_of(rows[-1:])
    return rows
