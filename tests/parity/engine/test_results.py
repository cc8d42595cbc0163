"""What becomes of exceptions in a check, which failure explains the others, and what no measure lets pass."""

import math
import re

import numpy as np
import pytest

from parity.engine import divergence, results
from parity.engine.errors import EngineError
from parity.engine.results import Result, explanation, guarded, relative_norm, relative_to_largest

NAMES = ("ours", "theirs")


def _raising(error):
    def check(_):
        yield Result("forward", "before it", 0.0, 1e-12)
        raise error

    return check


@pytest.mark.parametrize(
    "error", [ValueError("a shape [/of] (2, 3)"), IndexError(), EngineError("loss is nan"), KeyError("x")]
)
def test_an_exception_is_a_failed_case_after_those_that_were_compared(error):
    first, last = guarded("forward", _raising(error))(None)
    assert first.passed and first.case == "before it"
    assert not last.passed and last.check == "forward" and math.isfinite(last.measured)
    assert type(error).__name__ in last.where and str(error) in last.where and "after before it" in last.where


def test_the_innermost_line_of_this_repository_is_named():
    def singular(*arrays):
        return np.linalg.inv(
            np.zeros((2, 2))
        )  # raised in numpy, called from here, called from parity/engine/divergence.py

    x = {"x": np.ones(2)}
    compared = guarded("forward", lambda: iter(divergence.compare(x, x, NAMES, singular)), packages={"parity"})
    (result,) = compared()
    assert re.fullmatch(r"LinAlgError: Singular matrix \(parity/engine/divergence.py:\d+\)", result.where)
    (result,) = guarded("against", lambda: iter(singular()), packages={"parity", __name__.partition(".")[0]})()
    assert re.search(r"\(tests/parity/engine/test_results.py:\d+\)$", result.where)
    assert len(results.in_words(ValueError("long " * 1000))) < 400


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_passes(stop):
    with pytest.raises(stop):
        list(guarded("forward", _raising(stop()))(None))


def test_what_the_user_typed_is_refused_and_what_a_check_does_by_itself_fails():
    with pytest.raises(EngineError):
        list(guarded("against", _raising(EngineError("no such function")), passes=EngineError)(None))
    assert not list(guarded("mesh", _raising(EngineError("refused")))(None))[-1].passed


def test_a_check_that_compares_nothing_fails():
    (result,) = guarded("mesh", lambda _: iter(()))(None)
    assert not result.passed and "nothing" in result.where


# --- which check explains the others

RESTS_ON = {"model": (), "gradients": ("model",), "steps": ("gradients",), "curve": ("steps",), "text": ("model",)}


def _failing(*names):
    return [Result(name, "a case", 1.0 if name in names else 0.0, 0.0, f"place of {name}") for name in RESTS_ON]


@pytest.mark.parametrize(
    ("failing", "first", "resting"),
    [
        (("model", "gradients", "curve", "text"), "model", ("gradients", "curve", "text")),
        (("gradients", "curve"), "gradients", ("curve",)),  # through `steps`, which passed
        (("text",), "text", ()),
    ],
)
def test_the_check_on_which_the_other_failures_rest_is_named_first(failing, first, resting):
    sentence = explanation(_failing(*failing), RESTS_ON)
    assert sentence.startswith(f"look first at {first}, a case: place of {first}")
    assert all(name in sentence.partition("what failed in")[2] for name in resting)
    assert ("rests on it" in sentence) is bool(resting)


def test_failures_that_do_not_rest_on_each_other_are_both_named_and_no_failure_says_nothing():
    sentence = explanation(_failing("curve", "text"), RESTS_ON)
    assert "look first at curve" in sentence and "look first at text" in sentence and "rests on it" not in sentence
    assert explanation(_failing(), RESTS_ON) == ""


# --- measures


@pytest.mark.parametrize("measure", [relative_to_largest, relative_norm])
def test_values_that_are_not_finite_or_not_of_one_shape_and_dtype_never_pass(measure):
    x = np.arange(1.0, 5.0)
    for value in (math.nan, math.inf, -math.inf):
        bad = np.where(x == 2.0, value, x)
        assert math.isnan(measure(bad, bad)) and not measure(bad, x) <= 1.0 and not measure(x, bad) <= 1.0
    ones = np.ones((2, 4))
    for other in (np.ones(4), np.ones((1, 4)), np.ones(1), np.ones((2, 4), np.float32)):
        assert measure(ones, other) == measure(other, ones) == math.inf
    assert measure(ones, ones) == 0.0
