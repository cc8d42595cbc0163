"""The mapping of recurrent layers: gates, and the two biases that PyTorch has for each."""

import functools

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


class Layer(torch.nn.Module):
    def __init__(self, kind, width, outputs):
        super().__init__()
        self.cells, self.out = kind(6, width, batch_first=True), torch.nn.Linear(width, outputs)

    def forward(self, x):
        return self.out(self.cells(x)[0])


def rnn(p, x, h):
    return jnp.tanh(x @ p["wx"] + h @ p["wh"] + p["b"]), None


def lstm(p, x, h, c=0.0):
    i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(p, x, h):
    r, z = (jax.nn.sigmoid(x @ p[f"x{g}"] + h @ p[f"h{g}"] + p[f"b{g}"]) for g in "rz")
    new = jnp.tanh(x @ p["xn"] + p["bn"] + r * (h @ p["hn"] + p["cn"]))
    return (1 - z) * new + z * h, None


def scanned(p, x, cell, factor=1.0):
    """The cell and the output layer in one scan, as people write it by hand."""

    def step(state, x):
        h, *memory = state
        h, c = cell(p, x, h, *memory)
        return (h,) if c is None else (h, c), factor * (h @ p["out"]) + p["shift"]

    zeros = jnp.zeros((len(x), p["out"].shape[0]))
    _, outputs = jax.lax.scan(step, (zeros, zeros) if cell is lstm else (zeros,), x.swapaxes(0, 1))
    return outputs.swapaxes(0, 1)


def weights_of(cell, width, outputs):
    if cell is gru:
        shapes = {f"x{g}": (6, width) for g in "rzn"} | {f"h{g}": (width, width) for g in "rzn"}
        shapes |= dict.fromkeys(("br", "bz", "bn", "cn"), (width,))
    else:
        gates = 4 if cell is lstm else 1
        shapes = {"wx": (6, gates * width), "wh": (width, gates * width), "b": (gates * width,)}
    return {n: jnp.zeros(s) for n, s in (shapes | {"out": (width, outputs), "shift": (outputs,)}).items()}


@pytest.mark.long
@pytest.mark.parametrize(("width", "outputs"), [(4, 3), (4, 8), (6, 6)])
@pytest.mark.parametrize(
    ("kind", "cell"), [(torch.nn.RNN, rnn), (torch.nn.LSTM, lstm), (torch.nn.GRU, gru)], ids=["rnn", "lstm", "gru"]
)
def test_an_output_layer_inside_the_scan_is_mapped_by_values(kind, cell, width, outputs):
    """The first step multiplies the recurrent kernel by zeros, which shows nothing of it; the second one does."""
    x = np.stack([X, X[::-1]])
    reference, empty = Layer(kind, width, outputs), weights_of(cell, width, outputs)
    right = functools.partial(scanned, cell=cell), empty
    report = parity.compare(reference, right, inputs=x, checks=("weights", "forward"), generate=False)
    assert report.passed, report.in_words()
    found = {m.candidate: (m.reference, m.transform, m.verified) for m in report.mapping}
    assert found["out"] == ("out.weight", "transpose", True) and all(verified for _, _, verified in found.values())
    wrong = functools.partial(scanned, cell=cell, factor=1.01), empty
    report = parity.compare(reference, wrong, inputs=x, checks=("weights", "forward"), generate=False)
    assert report.verdict == "different"


def test_a_weight_that_only_ever_meets_zeros_is_mapped_by_its_name():
    report = parity.compare(
        Layer(torch.nn.LSTM, 4, 3), (functools.partial(scanned, cell=lstm), weights_of(lstm, 4, 3)), inputs=X[:, None]
    )
    found = {m.candidate: (m.reference, m.transform, m.verified) for m in report.mapping}
    assert found["wh"] == ("cells.weight_hh_l0", "transpose", False)
