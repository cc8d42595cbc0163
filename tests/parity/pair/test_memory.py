"""What a comparison holds in memory: models are large, so no weight is held more often than is needed."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import torch

import parity
from parity.models.model import Inputs
from parity.models.opening import open_model

WIDTH, LAYERS = 400, 4


class Deep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def port(parameters, x):
    for layer in parameters:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x


def test_numpy_holds_the_float64_weights_twice_at_most():
    """The random weights of the source; those of the target are views of them, or one copy."""
    empty = [{"kernel": jnp.zeros((WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)} for _ in range(LAYERS)]
    x = np.random.default_rng(0).standard_normal((2, WIDTH))
    tracemalloc.start()
    try:
        report = parity.compare(Deep(), (port, empty), inputs=x, checks=("weights", "forward"), generate=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.passed, report.in_words()
    assert peak < 2 * 8 * LAYERS * WIDTH * (WIDTH + 1)


def test_training_leaves_the_given_weights_as_they_are():
    """The module computes on the arrays themselves, unless it changes them."""
    model = open_model(torch.nn.Linear(3, 2), "model")
    weights = {w.name: w.value for w in model.weights()}
    before = {name: x.copy() for name, x in weights.items()}
    given = Inputs.of(np.ones((4, 3)))
    (untrained,) = model.run(weights, given)
    trained = model.train(weights, given, None, lambda p: torch.optim.SGD(p, lr=0.1), 2)
    assert trained.losses[1] < trained.losses[0]
    assert all(np.array_equal(weights[name], x) for name, x in before.items())
    assert np.array_equal(model.run(weights, given)[0], untrained)
