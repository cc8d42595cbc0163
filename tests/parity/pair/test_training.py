"""Gradients, and the state after a training step."""

import jax
import jax.numpy as jnp
import optax
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


class Attention(torch.nn.Module):
    """The keys' bias moves all scores of a query alike, so that its gradient is zero but for rounding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = torch.nn.Linear(6, 18), torch.nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x[None]).reshape(1, len(x), 3, 2, 3).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(len(x), 6))


class AttentionPort(nnx.Module):
    scale = 1.0

    def __init__(self):
        self.qkv, self.out = nnx.Linear(6, 18, rngs=nnx.Rngs(0)), nnx.Linear(6, 6, rngs=nnx.Rngs(1))

    def __call__(self, x):
        q, k, v = jnp.moveaxis(self.qkv(x[None]).reshape(1, len(x), 3, 2, 3), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # which rounds to float32 on the way
        return self.out(mixed.reshape(len(x), 6))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_gradient_that_is_rounding_alone_is_no_difference_where_one_side_rounds_to_float32(decay):
    optimizer = (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0), optax.adamw(1e-3, weight_decay=decay))
    report = parity.compare(
        Attention(), AttentionPort(), inputs=X, checks=("forward", "gradients", "optimizer"), optimizer=optimizer
    )
    assert failed(report) == (set() if decay == 0.0 else {"optimizer"}), report.in_words()
    where = next(r.where for r in report.results if r.check == "optimizer")
    assert "rounds to float32" in where and "without qkv.bias" in where
