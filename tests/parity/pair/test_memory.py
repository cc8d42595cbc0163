"""What a comparison holds in memory: models are large, so weights are shared."""

import jax.numpy as jnp
import numpy as np
import torch

from parity.models.model import Inputs
from parity.models.opening import open_model
from parity.pair.comparison import opened

X = np.random.default_rng(0).standard_normal((2, 6))


def port(parameters, x):
    return jnp.tanh(x @ parameters["kernel"]) @ parameters["kernel"]


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.kernel(torch.tanh(self.kernel(x)))


def test_weights_of_both_models_are_the_same_memory():
    c = opened(Twice(), (port, {"kernel": jnp.zeros((6, 6))}), inputs=X)
    (theirs,), (ours,) = c.weights["reference"].values(), c.weights["candidate"].values()
    assert np.array_equal(ours, theirs.T) and np.shares_memory(ours, theirs)
    c.reference.run(c.weights["reference"], c.cases[0][0])
    (inside,) = c.reference._tensors.values()
    assert np.shares_memory(inside.detach().numpy(), theirs)


def test_outputs_are_those_of_a_program_that_keeps_every_value():
    model = open_model((port, {"kernel": jnp.zeros((6, 6))}), "model")
    kernel = np.random.default_rng(1).standard_normal((6, 6))
    program = model.program(Inputs.of(X))
    every = program.run([kernel], [X], lifted=True)
    (output,) = model.run_lifted({"kernel": kernel}, Inputs.of(X))
    assert np.array_equal(output, every[program.outputs[0]])


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
