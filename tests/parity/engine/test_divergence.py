"""The first value that differs is named, with why it differs where a number doesn't say it."""

import math

import numpy as np

from parity.engine.divergence import Divergence, compare, first_beyond, worst_of

NAMES = ("JAX", "PyTorch")


def test_the_first_value_beyond_rounding_is_named_in_words_with_what_came_before():
    found = [Divergence("a", 0.0), Divergence("b", 2e-16), Divergence("c", 3.1e-4), Divergence("d", 1.0)]
    assert first_beyond(found, 1e-12, str.upper) == "C: relative difference 3.1e-04; everything before agrees to 2e-16"
    assert first_beyond(found[:2], 1e-12) == "largest at b"


def test_a_value_of_one_side_only_and_a_value_that_cannot_be_compared_are_named():
    x = {"a": np.ones(3), "h.1.ln_1": np.ones((2, 3)), "c": np.array([1.0, math.nan])}
    assert compare(x, {n: x[n] for n in ("a", "c")}, NAMES)[1] == Divergence("h.1.ln_1", math.inf, "missing in PyTorch")
    assert compare({"a": x["a"]}, x, NAMES)[1] == Divergence("h.1.ln_1", math.inf, "missing in JAX")
    found = compare({"h.1.ln_1": np.ones((1, 3))}, {"h.1.ln_1": x["h.1.ln_1"]}, NAMES)
    assert first_beyond(found, 1.0) == "h.1.ln_1: shape (1, 3) in JAX, (2, 3) in PyTorch"
    found = compare({"c": x["c"]}, {"c": x["c"]}, NAMES)
    assert not worst_of(found) <= 1.0
    words = "c: JAX has nan at [1], 1 of 2 values aren't finite; PyTorch has nan at [1], 1 of 2 values aren't finite"
    assert first_beyond(found, 1.0) == words


def test_a_constant_factor_is_named_and_rounding_is_not_one():
    x = np.random.default_rng(0).standard_normal((3, 4))
    (found,) = compare({"x": 1.25 * x}, {"x": x}, NAMES)
    assert found.note == "1.25 times as large in JAX as in PyTorch"
    for other in (x * (1 + 1e-15), x + np.eye(3, 4)):
        assert compare({"x": other}, {"x": x}, NAMES)[0].note == ""
