"""Own weights, and writing one model's weights into the other."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from squares import Square, X, failed, parameters, square

import parity


def test_own_weights_are_compared_and_transfer_makes_them_equal():
    reference = Square()
    _, written = parity.transfer(reference, (square, parameters()), inputs=X)
    assert parity.compare(reference, (square, written), inputs=X, weights="own").passed
    written["c"]["bias"] = written["c"]["bias"] + 1e-3
    report = parity.compare(reference, (square, written), inputs=X, weights="own")
    assert failed(report) == {"weights", "forward"}
    assert next(r.where for r in report.results if "own weights" in r.case).startswith("c.bias: relative difference")


def test_transfer_works_the_other_way_and_converter_for_checkpoints():
    drawn = jax.tree.map(lambda x: jnp.asarray(np.random.RandomState(2).standard_normal(x.shape)), parameters())
    module = parity.transfer((square, drawn), Square(), inputs=X)
    np.testing.assert_allclose(module(torch.tensor(X, dtype=torch.float32)).detach(), square(drawn, X), atol=1e-5)
    report = parity.compare(Square(), (square, parameters()), inputs=X, checks=("weights",))
    made = parity.converter(report.table)({n: t.numpy() for n, t in module.state_dict().items()})
    np.testing.assert_allclose(made["a.kernel"], drawn["a"]["kernel"], rtol=1e-6)
