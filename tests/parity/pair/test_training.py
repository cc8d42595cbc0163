"""Gradients, and the state after a training step."""

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from squares import Square, X, failed, parameters

import parity


@pytest.mark.long
def test_running_statistics_are_compared_after_a_training_step():
    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.first(x))

    class Port(nnx.Module):
        def __init__(self, momentum):
            self.first = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(6, momentum=momentum, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.first(x))

    checks = ("weights", "forward", "state")
    report = parity.compare(Reference(), Port(0.1), inputs=X, mode="train", checks=checks)
    assert failed(report) == {"state"} and any("momentum" in h for h in report.hints)
    report = parity.compare(Reference(), Port(0.9), inputs=X, mode="train", checks=checks)
    # PyTorch keeps the unbiased variance, Flax the biased one: the mean is right, and the variance is named.
    assert [r.case for r in report.results if not r.passed] == ["norm.var"]
    assert any("Bessel" in h for h in report.hints)


def test_gradients_are_named_in_the_order_of_the_backward_pass():
    """Forward passes agree; what comes before c has half its gradient, and b is the nearest to the outputs of that."""

    def port(parameters, x):
        h = jnp.tanh(x @ parameters["a"]["kernel"] + parameters["a"]["bias"])
        h = jnp.tanh(h @ parameters["b"]["kernel"] + parameters["b"]["bias"])
        h = 0.5 * h + jax.lax.stop_gradient(0.5 * h)
        return h @ parameters["c"]["kernel"] + parameters["c"]["bias"]

    report = parity.compare(Square(), (port, parameters()), inputs=X)
    assert failed(report) == {"gradients"}
    where = next(r.where for r in report.results if not r.passed)
    assert where.startswith("in the order of the backward pass b.") and "everything before agrees" in where
