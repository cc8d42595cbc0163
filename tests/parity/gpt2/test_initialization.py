"""Initial weights: the distributions that are told apart, from which size on, and no alarm on right ones."""

import dataclasses

import numpy as np
import pytest

from parity.engine.results import Result
from parity.gpt2 import limits
from parity.gpt2.adapters import both
from parity.gpt2.checks.initialization import MORE_TENSORS, SIZE, _distributions, _family, _prescribed, check
from parity.gpt2.faults import MODEL, case_of

pytestmark = pytest.mark.usefixtures("x64")

WRONG = {
    "uniform": lambda g, n: g.uniform(-np.sqrt(3), np.sqrt(3), n),
    "Laplace": lambda g, n: g.laplace(size=n) / np.sqrt(2),
    "truncated at two deviations": lambda g, n: _truncated(g, n) / 0.87962566,
    "half as wide": lambda g, n: g.standard_normal(n) / 2,
    "shifted": lambda g, n: g.standard_normal(n) + 0.15,
}


def _truncated(generator: np.random.Generator, n: int) -> np.ndarray:
    values = generator.standard_normal(2 * n)
    return values[np.abs(values) < 2][:n]


@pytest.mark.parametrize("name", WRONG)
def test_another_distribution_is_seen_in_the_smallest_tensor_there_is(name):
    for seed in range(5):
        generator = np.random.default_rng(seed)
        values = {"right": generator.standard_normal(4096), "wrong": WRONG[name](generator, 4096)}
        result = _distributions("", values)
        assert not result.passed and "wrong" in result.where, result


def test_two_families_are_told_apart_where_they_differ_most():
    generator = np.random.default_rng(0)
    normal, again = generator.standard_normal((2, 20_000))
    assert _family("", ("A", "B"), normal, again).passed
    cut = np.clip(again, -1.0, None)
    result = _family("", ("A", "B"), normal, cut)
    assert not result.passed
    assert result.where.startswith("most apart at -1.0") and "below which A has 15." in result.where, result.where


@pytest.mark.long
def test_normal_values_are_not_suspected():
    measured = [
        _distributions("", {n: np.random.default_rng([seed, i]).standard_normal(4096) for i, n in enumerate("abcdef")})
        for seed in range(100)
    ]
    # At most one run in ten has a test beyond -log10 p = 1, and of a hundred runs 25 would be far too many.
    assert all(result.passed for result in measured) and 1 <= sum(result.measured > 1.0 for result in measured) <= 25


def test_every_tensor_that_is_drawn_is_large_enough_to_be_judged():
    for options in ({}, MORE_TENSORS):
        config = dataclasses.replace(MODEL, **SIZE | options)
        drawn = [n for n in config.parameter_shapes if _prescribed(n, config)[1] > 0]
        assert drawn and min(np.prod(config.parameter_shapes[n]) for n in drawn) >= 4096


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_right_initialisers_are_not_suspected(seed):
    case = dataclasses.replace(case_of(), seed=seed, level="default")
    results = list(check(case, *both(case.weights)))
    assert [r for r in results if isinstance(r, Result) and not r.passed] == [] and limits.SURPRISE == 6.0
