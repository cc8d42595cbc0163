"""What can't be compared is refused in one sentence."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from squares import EMPTY, Linear, Square, X, linear, parameters, square

import parity
from parity.engine.errors import EngineError


@pytest.mark.parametrize(
    ("candidate", "options", "words"),
    [
        (lambda: 3, {}, "the candidate is a builtins.int; expected a torch.nn.Module"),
        (lambda: square, {}, "the function square without its parameters"),
        (lambda: makes_nothing, {}, "makes_nothing() makes no model: ValueError: no weights (tests/parity/pair/"),
        (lambda: (square, parameters()), {"checks": ("forwards",)}, "no check is called 'forwards'"),
        (lambda: (square, parameters()), {"weights": "mine"}, "expected 'random' or 'own'"),
        (lambda: (square, parameters()), {"ignore": ["d.kernel"]}, "d.kernel is a weight of neither model"),
        (
            lambda: (square, parameters()),
            {"mapping": "- source: a.weigth\n  target: a.kernel\n"},
            "did you mean a.weight",
        ),
        (lambda: (square, parameters()), {"mapping": "- source: a.bias\n  target: a.kernel\n"}, "has shape (6, 6)"),
        (lambda: (lambda p, x: square(p, x) * jnp.nan, parameters()), {}, "the candidate returns NaN"),
        (lambda: (lambda p, x: square(p, x) + 1j, parameters()), {}, "complex numbers"),
        (lambda: (square, parameters(5)), {}, "can't be traced with these inputs"),
        (lambda: Noisy(), {}, "other outputs when it is called again"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(candidate, options, words):
    with pytest.raises(EngineError) as error:
        parity.compare(Square(), candidate(), inputs=X, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def makes_nothing():
    raise ValueError("no weights")


class Noisy(Square):
    def forward(self, x):
        return super().forward(x) + torch.randn(())


def test_inputs_that_the_reference_does_not_take_are_a_sentence():
    with pytest.raises(EngineError, match="the PyTorch model can't be called with these inputs: RuntimeError"):
        parity.compare(Linear(), (linear, EMPTY), inputs=np.zeros((4, 7)))
