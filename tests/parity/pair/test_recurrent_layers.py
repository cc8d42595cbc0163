"""The mapping of recurrent layers: gates, and the two biases that PyTorch has for each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen
from squares import X

import parity


@pytest.mark.long
def test_the_gates_of_an_lstm_and_its_two_biases_are_mapped():
    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.out = torch.nn.LSTM(6, 4, batch_first=True), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.cells(x)[0])

    class Port(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.RNN(linen.OptimizedLSTMCell(4))(x))

    x = X[None, :, :].repeat(2, 0)
    shapes = jax.eval_shape(lambda: Port().init(jax.random.key(0), jnp.asarray(x, jnp.float32)))
    report = parity.compare(Reference, (Port(), jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)), inputs=x)
    assert report.passed, report.in_words()
    found = {m.candidate: (m.reference, m.transform) for m in report.mapping}
    for number, gate in enumerate("ifgo"):
        cell = f"OptimizedLSTMCell_0.h{gate}"
        assert found[f"{cell}.kernel"] == ("cells.weight_hh_l0", f"chunk({number}, 4, 0) | transpose")
        assert found[f"{cell}.bias"] == ("cells.bias_ih_l0 + cells.bias_hh_l0", f"add | chunk({number}, 4, 0)")


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.out = torch.nn.GRU(6, 4, batch_first=True), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.cells(x)[0])


@pytest.mark.long
def test_the_biases_of_a_gru_are_mapped():
    """The reset and update gates add two biases of PyTorch; the third gate keeps them apart, because one is gated."""
    import equinox

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.RNN(linen.GRUCell(4))(x))

    class Equinox(equinox.Module):
        cell: equinox.nn.GRUCell
        out: equinox.nn.Linear

        def __init__(self):
            self.cell = equinox.nn.GRUCell(6, 4, key=jax.random.key(0))
            self.out = equinox.nn.Linear(4, 3, key=jax.random.key(1))

        def __call__(self, x):
            def step(h, x):
                h = jax.vmap(self.cell)(x, h)
                return h, h

            _, states = jax.lax.scan(step, jnp.zeros((len(x), 4)), x.swapaxes(0, 1))
            return jax.vmap(jax.vmap(self.out))(states.swapaxes(0, 1))

    x = np.stack([X, X[::-1]])
    shapes = jax.eval_shape(lambda: Linen().init(jax.random.key(0), jnp.asarray(x, jnp.float32)))
    report = parity.compare(Recurrent, (Linen(), jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)), inputs=x)
    assert report.passed, report.in_words()
    found = {m.candidate.removeprefix("GRUCell_0."): (m.reference, m.transform) for m in report.mapping}
    for number, gate in enumerate("rzn"):
        assert found[f"h{gate}.kernel"] == ("cells.weight_hh_l0", f"chunk({number}, 3, 0) | transpose")
        assert found[f"i{gate}.kernel"] == ("cells.weight_ih_l0", f"chunk({number}, 3, 0) | transpose")
    for number, gate in enumerate("rz"):
        assert found[f"i{gate}.bias"] == ("cells.bias_ih_l0 + cells.bias_hh_l0", f"add | chunk({number}, 3, 0)")
    assert found["in.bias"] == ("cells.bias_ih_l0", "chunk(2, 3, 0)")
    assert found["hn.bias"] == ("cells.bias_hh_l0", "chunk(2, 3, 0)")
    report = parity.compare(Recurrent, Equinox, inputs=x)
    assert report.passed, report.in_words()
    found = {m.candidate: (m.reference, m.transform) for m in report.mapping}
    assert found["cell.bias"] == ("cells.bias_ih_l0 + cells.bias_hh_l0", "add_first(2, 3)")
    assert found["cell.bias_n"] == ("cells.bias_hh_l0", "chunk(2, 3, 0)")
