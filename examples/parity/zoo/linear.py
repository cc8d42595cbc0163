"""Linear layers, and the flattening before them."""

import equinox as eqx
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from .frameworks import KEY, data, equinox_call, filled, flax_calls, tensors, torch_call
from .layouts import channels_last, kernel
from .rows import Pair, Row

FAMILY = "linear"
TITLE = "Linear layers"


def _linear(bias: bool = True) -> tuple[torch.nn.Linear, np.ndarray]:
    return filled(torch.nn.Linear(4, 3, bias=bias)), data(2, 4)


def _flax(bias: bool = True) -> Pair:
    module, x = _linear(bias)
    values = {"kernel": kernel(tensors(module)["weight"])} | ({"bias": tensors(module)["bias"]} if bias else {})
    layers = nnx.Linear(4, 3, use_bias=bias, rngs=nnx.Rngs(0)), nn.Dense(3, use_bias=bias)
    return torch_call(module, x), flax_calls(*layers, values, x)


def _equinox() -> Pair:
    module, x = _linear()
    return torch_call(module, x), equinox_call(eqx.nn.Linear(4, 3, key=KEY), tensors(module), x)


def _square(transpose: bool) -> Pair:
    module, x = filled(torch.nn.Linear(4, 4)), data(2, 4)
    weight = tensors(module)["weight"]
    values = {"kernel": kernel(weight) if transpose else weight, "bias": tensors(module)["bias"]}
    return torch_call(module, x), flax_calls(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nn.Dense(4), values, x)


def _flattened(reorder: bool) -> Pair:
    module, x = filled(torch.nn.Linear(2 * 3 * 4, 5)), data(2, 2, 3, 4)
    weight = tensors(module)["weight"]
    reordered = weight.reshape(5, 2, 3, 4).transpose(2, 3, 1, 0).reshape(-1, 5)
    values = {"kernel": reordered if reorder else kernel(weight), "bias": tensors(module)["bias"]}
    inputs = channels_last(x).reshape(2, -1)
    return torch_call(module, x.reshape(2, -1)), flax_calls(
        nnx.Linear(24, 5, rngs=nnx.Rngs(0)), nn.Dense(5), values, inputs
    )


def _bilinear() -> Pair:
    module, a, b = filled(torch.nn.Bilinear(4, 3, 5)), data(2, 4), data(2, 3, seed=2)
    weight, bias = (jnp.asarray(value) for value in tensors(module).values())
    return torch_call(module, a, b), jnp.einsum("ni,oij,nj->no", a, weight, b) + bias


ROWS = [
    Row(FAMILY, "nn.Linear(4, 3)", "`nnx.Linear(4, 3)`, `nn.Dense(3)`", "Flax", _flax),
    Row(FAMILY, "nn.Linear(4, 3)", "eqx.nn.Linear(4, 3)", "Equinox", _equinox),
    Row(FAMILY, "nn.Linear(4, 3, bias=False)", "Linear(4, 3, use_bias=False)", "Flax", lambda: _flax(bias=False)),
    Row(
        FAMILY,
        "`nn.Linear(4, 4)`, its weight copied as it is",
        "`nnx.Linear(4, 4)`, `nn.Dense(4)`",
        "Flax",
        lambda: _square(transpose=False),
        lambda: _square(transpose=True),
        "`kernel = weight.T`",
        "the shape fits, so nothing warns",
        claim="after",
    ),
    Row(
        FAMILY,
        "`x.flatten(1)`, `nn.Linear(24, 5)`",
        "`x.reshape(n, -1)`, `Linear(24, 5)`",
        "Flax",
        lambda: _flattened(reorder=False),
        lambda: _flattened(reorder=True),
        "reorder the kernel's rows (above), or transpose `x` back to channels first before flattening",
        "in Flax x is (n, h, w, c)",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.Bilinear(4, 3, 5)",
        'einsum("ni,oij,nj->no", a, weight, b) + bias',
        "jax.numpy",
        _bilinear,
        note="no layer of its own",
    ),
]
