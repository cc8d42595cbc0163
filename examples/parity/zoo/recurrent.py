"""LSTM, GRU and plain recurrent networks."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from .frameworks import KEY, data, equinox_with, filled, linen_call, tensors, torch_call, with_values
from .rows import Pair, Row

FAMILY = "recurrent"
TITLE = "Recurrent layers"

I, H, T, B = 3, 4, 5, 2

# Flax's cells start from zeros of the dtype that their weights were made in.
WIDE = {"param_dtype": jnp.float64}


def _x() -> np.ndarray:
    return data(B, T, I)


def _torch(kind=torch.nn.LSTM, **arguments) -> torch.nn.RNNBase:
    return filled(kind(I, H, batch_first=True, **arguments))


def _weights(module: torch.nn.RNNBase, suffix: str = "l0") -> tuple[np.ndarray, ...]:
    """weight_ih, weight_hh, bias_ih, bias_hh of one cell."""
    state = tensors(module)
    return tuple(state[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))


# ---- LSTM


def lstm_values(module: torch.nn.LSTM, gates: str = "", suffix: str = "l0") -> dict[str, np.ndarray]:
    """Of OptimizedLSTMCell; with the names of the gates, of the cells that hold every gate apart."""
    weight_ih, weight_hh, bias_ih, bias_hh = _weights(module, suffix)
    if not gates:
        return {"dense_i.kernel": weight_ih.T, "dense_h.kernel": weight_hh.T, "dense_h.bias": bias_ih + bias_hh}
    values = {}
    for gate, w, u, b in zip(
        gates.split(), *(np.split(v, 4) for v in (weight_ih, weight_hh, bias_ih + bias_hh)), strict=True
    ):
        values |= {f"i{gate}.kernel": w.T, f"h{gate.strip('_')}.kernel": u.T, f"h{gate.strip('_')}.bias": b}
    return values


def _nnx_lstm(cell, gates: str = "") -> Pair:
    module, x = _torch(), _x()
    rnn = nnx.RNN(with_values(cell(I, H, **WIDE, rngs=nnx.Rngs(0)), lstm_values(module, gates)), return_carry=True)
    reference, (h, c) = torch_call(module, x)
    (new_c, new_h), output = rnn(jnp.asarray(x))
    return (reference, h[0], c[0]), (output, new_h, new_c)


def _linen_lstm(cell) -> Pair:
    module, x = _torch(), _x()
    values = {f"cell.{name}": value for name, value in lstm_values(module, "i f g o").items()}
    reference, (h, c) = torch_call(module, x)
    (new_c, new_h), output = linen_call(nn.RNN(cell(H, **WIDE), return_carry=True), values, x)
    return (reference, h[0], c[0]), (output, new_h, new_c)


def _equinox_scan(cell, start, x: np.ndarray):
    """All states of an Equinox cell over one example's time."""

    def step(state, value):
        state = cell(value, state)
        return state, state

    return jax.lax.scan(step, start, x)[1]


def _equinox_lstm() -> Pair:
    module, x = _torch(), _x()
    weight_ih, weight_hh, bias_ih, bias_hh = _weights(module)
    values = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias": bias_ih + bias_hh}
    cell = equinox_with(eqx.nn.LSTMCell(I, H, key=KEY), values)
    zeros = jnp.zeros(H)
    h, c = jax.vmap(lambda x: _equinox_scan(cell, (zeros, zeros), x))(jnp.asarray(x))
    reference, (_, last) = torch_call(module, x)
    return (reference, last[0]), (h, c[:, -1])


def _carry(swap: bool) -> Pair:
    """A state given from outside."""
    module, x = _torch(), _x()
    h, c = data(B, H, seed=7), data(B, H, seed=8)
    state = tuple(torch.from_numpy(value)[None] for value in (h, c))
    cell = with_values(nnx.OptimizedLSTMCell(I, H, **WIDE, rngs=nnx.Rngs(0)), lstm_values(module))
    carry = (c, h) if swap else (h, c)
    output = nnx.RNN(cell)(jnp.asarray(x), initial_carry=tuple(jnp.asarray(value) for value in carry))
    return module(torch.from_numpy(x), state)[0], output


def _time_major(flag: bool) -> Pair:
    """PyTorch's layer as it is by default, on the same array."""
    module, x = filled(torch.nn.LSTM(I, H)), data(T, B, I)
    cell = with_values(nnx.OptimizedLSTMCell(I, H, **WIDE, rngs=nnx.Rngs(0)), lstm_values(module))
    return torch_call(module, x)[0], nnx.RNN(cell, time_major=flag)(jnp.asarray(x))


def _bidirectional() -> Pair:
    module, x = _torch(bidirectional=True), _x()
    cells = [
        with_values(nnx.OptimizedLSTMCell(I, H, **WIDE, rngs=nnx.Rngs(0)), lstm_values(module, suffix=suffix))
        for suffix in ("l0", "l0_reverse")
    ]
    return torch_call(module, x)[0], nnx.Bidirectional(*(nnx.RNN(cell) for cell in cells))(jnp.asarray(x))


def _two_layers() -> Pair:
    module, x = _torch(num_layers=2), jnp.asarray(_x())
    for suffix, width in (("l0", I), ("l1", H)):
        cell = nnx.OptimizedLSTMCell(width, H, **WIDE, rngs=nnx.Rngs(0))
        x = nnx.RNN(with_values(cell, lstm_values(module, suffix=suffix)))(x)
    return torch_call(module, _x())[0], x


def _packed(mask: bool) -> Pair:
    """Sequences of lengths 5 and 3: the output, and the last state."""
    module, x, lengths = _torch(), _x(), np.array([5, 3])
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.from_numpy(x), torch.from_numpy(lengths), batch_first=True)
    output, (h, c) = module(packed)
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
    cell = with_values(nnx.OptimizedLSTMCell(I, H, **WIDE, rngs=nnx.Rngs(0)), lstm_values(module))
    (new_c, new_h), y = nnx.RNN(cell, return_carry=True)(jnp.asarray(x), seq_lengths=jnp.asarray(lengths))
    if mask:
        y = jnp.where((np.arange(T) < lengths[:, None])[..., None], y, 0)
    return (output, h[0], c[0]), (y, new_h, new_c)


# ---- GRU


def _gru_biases(bias_ih: np.ndarray, bias_hh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums for r and z with the inner bias of n; the bias of n that the reset gate multiplies."""
    summed = bias_ih + bias_hh
    return np.concatenate([summed[: 2 * H], bias_ih[2 * H :]]), bias_hh[2 * H :]


class GRUCellWithBias(nnx.GRUCell):
    """NNX's cell with the bias that its documentation writes: W_hn h + b_hn."""

    def __init__(self, in_features: int, hidden_features: int, *, rngs: nnx.Rngs, **arguments):
        super().__init__(in_features, hidden_features, rngs=rngs, **arguments)
        self.dense_h = nnx.Linear(hidden_features, 3 * hidden_features, rngs=rngs)


def _nnx_gru(cell) -> Pair:
    module, x = _torch(torch.nn.GRU), _x()
    weight_ih, weight_hh, bias_ih, bias_hh = _weights(module)
    bias, bias_n = _gru_biases(bias_ih, bias_hh)
    values = {"dense_i.kernel": weight_ih.T, "dense_i.bias": bias, "dense_h.kernel": weight_hh.T}
    if cell is GRUCellWithBias:
        values["dense_h.bias"] = np.concatenate([np.zeros(2 * H), bias_n])
    rnn = nnx.RNN(with_values(cell(I, H, **WIDE, rngs=nnx.Rngs(0)), values))
    return torch_call(module, x)[0], rnn(jnp.asarray(x))


def _nnx_gru_without_bias() -> Pair:
    module, x = _torch(torch.nn.GRU, bias=False), _x()
    state = tensors(module)
    values = {
        "dense_i.kernel": state["weight_ih_l0"].T,
        "dense_i.bias": np.zeros(3 * H),
        "dense_h.kernel": state["weight_hh_l0"].T,
    }
    rnn = nnx.RNN(with_values(nnx.GRUCell(I, H, **WIDE, rngs=nnx.Rngs(0)), values))
    return torch_call(module, x)[0], rnn(jnp.asarray(x))


def _linen_gru() -> Pair:
    module, x = _torch(torch.nn.GRU), _x()
    weight_ih, weight_hh, bias_ih, bias_hh = _weights(module)
    bias, bias_n = _gru_biases(bias_ih, bias_hh)
    values = {"cell.hn.bias": bias_n}
    for gate, w, u, b in zip("rzn", *(np.split(v, 3) for v in (weight_ih, weight_hh, bias)), strict=True):
        values |= {f"cell.i{gate}.kernel": w.T, f"cell.h{gate}.kernel": u.T, f"cell.i{gate}.bias": b}
    return torch_call(module, x)[0], linen_call(nn.RNN(nn.GRUCell(H, **WIDE)), values, x)


def _equinox_gru() -> Pair:
    module, x = _torch(torch.nn.GRU), _x()
    weight_ih, weight_hh, bias_ih, bias_hh = _weights(module)
    bias, bias_n = _gru_biases(bias_ih, bias_hh)
    values = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias": bias, "bias_n": bias_n}
    cell = equinox_with(eqx.nn.GRUCell(I, H, key=KEY), values)
    return torch_call(module, x)[0], jax.vmap(lambda x: _equinox_scan(cell, jnp.zeros(H), x))(jnp.asarray(x))


# ---- plain


def _simple(nonlinearity: str = "tanh") -> tuple[torch.nn.RNN, np.ndarray, dict[str, np.ndarray]]:
    module = _torch(torch.nn.RNN, nonlinearity=nonlinearity)
    weight_ih, weight_hh, bias_ih, bias_hh = _weights(module)
    return module, _x(), {"i.kernel": weight_ih.T, "i.bias": bias_ih + bias_hh, "h.kernel": weight_hh.T}


def _nnx_simple(**arguments) -> Pair:
    module, x, values = _simple()
    cell = nnx.SimpleCell(I, H, **arguments, rngs=nnx.Rngs(0))
    cell = with_values(cell, {f"dense_{name}": value for name, value in values.items()})
    return torch_call(module, x)[0], nnx.RNN(cell)(jnp.asarray(x))


def _linen_simple(nonlinearity: str = "tanh", **arguments) -> Pair:
    module, x, values = _simple(nonlinearity)
    rnn = nn.RNN(nn.SimpleCell(H, **arguments, **WIDE))
    return torch_call(module, x)[0], linen_call(rnn, {f"cell.{name}": value for name, value in values.items()}, x)


ROWS = [
    Row(
        FAMILY,
        "`nn.LSTM(3, 4)`, outputs and state",
        "nnx.RNN(nnx.OptimizedLSTMCell(3, 4))",
        "NNX",
        lambda: _nnx_lstm(nnx.OptimizedLSTMCell),
    ),
    Row(
        FAMILY,
        "`nn.LSTM(3, 4)`, outputs and state",
        "nnx.RNN(nnx.LSTMCell(3, 4))",
        "NNX",
        lambda: _nnx_lstm(nnx.LSTMCell, "i f_ g o"),
    ),
    Row(
        FAMILY,
        "`nn.LSTM(3, 4)`, outputs and state",
        "nn.RNN(nn.LSTMCell(4))",
        "Linen",
        lambda: _linen_lstm(nn.LSTMCell),
    ),
    Row(
        FAMILY,
        "`nn.LSTM(3, 4)`, outputs and state",
        "nn.RNN(nn.OptimizedLSTMCell(4))",
        "Linen",
        lambda: _linen_lstm(nn.OptimizedLSTMCell),
    ),
    Row(FAMILY, "`nn.LSTM(3, 4)`, outputs and state", "`eqx.nn.LSTMCell(3, 4)` in a scan", "Equinox", _equinox_lstm),
    Row(
        FAMILY,
        "nn.LSTM(3, 4)(x, (h, c))",
        "rnn(x, initial_carry=(h, c))",
        "NNX",
        lambda: _carry(swap=False),
        lambda: _carry(swap=True),
        "`initial_carry=(c, h)`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.LSTM(3, 4)` on (time, batch, features)",
        "nnx.RNN(cell)",
        "NNX",
        lambda: _time_major(flag=False),
        lambda: _time_major(flag=True),
        "`time_major=True`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.LSTM(3, 4, bidirectional=True)",
        "nnx.Bidirectional(nnx.RNN(forward), nnx.RNN(backward))",
        "NNX",
        _bidirectional,
    ),
    Row(FAMILY, "nn.LSTM(3, 4, num_layers=2)", "two `nnx.RNN`, one after the other", "NNX", _two_layers),
    Row(
        FAMILY,
        "`pack_padded_sequence`, `nn.LSTM(3, 4)`, `pad_packed_sequence`",
        "rnn(x, seq_lengths=lengths)",
        "NNX",
        lambda: _packed(mask=False),
        lambda: _packed(mask=True),
        "`jnp.where(beyond the length, 0, outputs)`",
        "the last state agrees as it comes; outputs beyond a sequence's end are 0 in PyTorch alone",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.GRU(3, 4)",
        "nnx.RNN(nnx.GRUCell(3, 4))",
        "NNX",
        lambda: _nnx_gru(nnx.GRUCell),
        lambda: _nnx_gru(GRUCellWithBias),
        "a subclass whose `dense_h` has a bias: 0 for r and z, `bias_hh` for n",
        "the cell has no place for the bias that the reset gate multiplies",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.GRU(3, 4, bias=False)",
        "`nnx.RNN(nnx.GRUCell(3, 4))`, its bias 0",
        "NNX",
        _nnx_gru_without_bias,
    ),
    Row(FAMILY, "nn.GRU(3, 4)", "nn.RNN(nn.GRUCell(4))", "Linen", _linen_gru),
    Row(FAMILY, "nn.GRU(3, 4)", "`eqx.nn.GRUCell(3, 4)` in a scan", "Equinox", _equinox_gru),
    Row(
        FAMILY,
        "nn.RNN(3, 4)",
        "nnx.RNN(nnx.SimpleCell(3, 4))",
        "NNX",
        _nnx_simple,
        lambda: _nnx_simple(dtype=jnp.float64, **WIDE),
        "`dtype=float64, param_dtype=float64`",
        "its `dtype` is float32 unless it is given, not None as in the other cells",
        claim="after",
    ),
    Row(FAMILY, "nn.RNN(3, 4)", "nn.RNN(nn.SimpleCell(4))", "Linen", _linen_simple),
    Row(
        FAMILY,
        'nn.RNN(3, 4, nonlinearity="relu")',
        "nn.RNN(nn.SimpleCell(4))",
        "Linen",
        lambda: _linen_simple("relu"),
        lambda: _linen_simple("relu", activation_fn=nn.relu),
        "`activation_fn=nn.relu`",
        claim="after",
    ),
]
