"""Tables and numbers that a JAX program holds as constants, rounded or frozen."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from squares import Square, X, parameters, square

import parity
from parity.models.jax_model import JaxModel, of_tree
from parity.models.model import Inputs

ANGLES = np.arange(5)[:, None] * 10.0 ** -np.arange(6)


class Turned(Square):
    """Multiplies by a table that it computes; the mask asks for the lowest number of the inputs' type."""

    def forward(self, x):
        lowest = torch.full((5, 1), torch.finfo(x.dtype).min)
        table = torch.cos(torch.arange(5)[:, None] * 10.0 ** -torch.arange(6))
        return torch.maximum(super().forward(x * table), lowest)


@pytest.mark.parametrize(("angles", "verdict"), [(ANGLES, "same"), (ANGLES * (1 + 1e-4), "different")])
def test_a_table_that_was_rounded_before_tracing_counts_as_a_cast(angles, verdict):
    def port(parameters, x):
        table = jnp.broadcast_to(jnp.asarray(np.cos(angles.astype(np.float32)))[None], (1, 5, 6))[0]
        return square(parameters, x * table)

    report = parity.compare(Turned(), (port, parameters()), inputs=X, generate=False)
    assert report.verdict == verdict, report.in_words()
    if verdict == "same":
        assert any("candidate rounds to float32" in r.where for r in report.results)


class Scaled(Square):
    """Writes a factor with eight digits."""

    def forward(self, x):
        return super().forward(0.79788456 * x)


@pytest.mark.parametrize(
    ("factor", "dtype", "verdict"),
    [
        (0.79788456, "float32", "same"),
        (float(np.sqrt(2 / np.pi)), "float32", "same"),  # rounds to the same number
        (float(np.sqrt(2 / np.pi)), "float64", "different"),
        (0.7978848, "float32", "different"),
    ],
)
def test_a_number_that_is_held_in_float32_is_the_one_that_the_reference_writes(factor, dtype, verdict):
    def port(parameters, x):
        return square(parameters, (x.astype(dtype) * factor).astype(x.dtype))

    report = parity.compare(Scaled(), (port, parameters()), inputs=X, checks=("forward",))
    assert report.verdict == verdict, report.in_words()


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "same"), (1.001, "different")])
def test_a_frozen_table_that_the_candidate_computes_needs_no_counterpart(factor, verdict):
    class Positions(Square):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.tensor(np.sin(ANGLES)), requires_grad=False)

        def forward(self, x):
            return super().forward(x + self.table)

    port = (lambda p, x: square(p, x + factor * jnp.sin(jnp.asarray(ANGLES))), parameters())
    report = parity.compare(Positions(), port, inputs=X, generate=False)
    assert report.verdict == verdict, report.in_words()


def test_a_number_that_float32_cannot_hold_stands_for_no_other():
    """1e-300 is 0 in float32, and the candidate's 0 stays 0; so does infinity."""
    program = JaxModel(of_tree({}, lambda _, x: jnp.maximum(x.astype("float32") + 0.0, -jnp.inf), "function")).program(
        Inputs.of(X)
    )
    assert program.with_numbers({1e-300, -1e300}) is program
    assert program.with_numbers({2.0}) is program
