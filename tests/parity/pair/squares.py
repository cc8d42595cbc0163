"""Three square layers and a single one, in PyTorch and as functions of JAX: the small pairs of the tests."""

import jax.numpy as jnp
import numpy as np
import torch

X = np.random.RandomState(1).standard_normal((5, 6))


class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def square(parameters, x, untransposed=""):
    for name in ("a", "b", "c"):
        kernel = parameters[name]["kernel"]
        x = x @ (kernel.T if name == untransposed else kernel) + parameters[name]["bias"]
        x = jnp.tanh(x) if name != "c" else x
    return x


def parameters(size: int = 6) -> dict:
    return {n: {"kernel": jnp.zeros((size, size)), "bias": jnp.zeros(size)} for n in ("a", "b", "c")}


class Linear(torch.nn.Module):
    def __init__(self, function=lambda y: y):
        super().__init__()
        self.l, self.function = torch.nn.Linear(6, 3), function

    def forward(self, x):
        return self.function(self.l(x))


def linear(parameters, x):
    return x @ parameters["w"] + parameters["b"]


EMPTY = {"w": jnp.zeros((6, 3)), "b": jnp.zeros(3)}


def failed(report) -> set[str]:
    return {r.check for r in report.results if not r.passed}
