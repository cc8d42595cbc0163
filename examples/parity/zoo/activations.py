"""Activation functions, and gradients at corners."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx

from .frameworks import data, filled, linen_call, tensors, torch_call, with_values
from .rows import Pair, Row

FAMILY = "activations"
TITLE = "Activation functions"

X = np.linspace(-8, 8, 97)


# Equal as they come: PyTorch's name in torch.nn.functional, JAX's in jax.nn.
SAME = {
    "relu": "relu",
    "relu6": "relu6",
    "silu": "silu",
    "elu": "elu",
    "celu": "celu",
    "selu": "selu",
    "mish": "mish",
    "softsign": "soft_sign",
    "logsigmoid": "log_sigmoid",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "hardsigmoid": "hard_sigmoid",
    "hardswish": "hard_swish",
    "hardtanh": "hard_tanh",
    "leaky_relu": "leaky_relu",
}


def _formula(name: str, formula: str, one, other) -> Row:
    return Row(FAMILY, name, formula, "jax.numpy", _pair(one, other), note="no function of its own")


def _pair(one, other, x: np.ndarray = X):
    return lambda: (torch_call(one, x), other(jnp.asarray(x)))


def _both(name: str, other_name: str, one, other, changed, change: str, note: str = "", x: np.ndarray = X) -> Row:
    return Row(
        FAMILY, name, other_name, "jax.nn", _pair(one, other, x), _pair(one, changed, x), change, note, claim="after"
    )


def _prelu(framework: str) -> Pair:
    module, x = filled(torch.nn.PReLU()), X
    slope = tensors(module)["weight"]
    if framework == "Equinox":
        return torch_call(module, x), eqx.nn.PReLU(jnp.asarray(slope[0]))(jnp.asarray(x))
    values = {"negative_slope": slope[0]}
    return torch_call(module, x), [
        with_values(nnx.PReLU(param_dtype=jnp.float64), values)(jnp.asarray(x)),
        linen_call(nn.PReLU(), values, x),
    ]


def _prelu_channels(by_hand: bool) -> Pair:
    module, x = filled(torch.nn.PReLU(3)), data(2, 3, 4)
    slope = tensors(module)["weight"]
    if by_hand:
        return torch_call(module, x), jnp.where(x >= 0, x, slope[:, None] * x)
    layer = with_values(nnx.PReLU(param_dtype=jnp.float64), {"negative_slope": slope[0]})
    return torch_call(module, x), layer(jnp.asarray(x))


def _softmax(axis: int | None) -> Pair:
    x = data(2, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that dim is chosen by PyTorch
        reference = torch_call(torch.nn.Softmax(), x)
    return reference, jax.nn.softmax(x) if axis is None else jax.nn.softmax(x, axis=axis)


def _glu(dim: int, axis: int) -> Pair:
    x = data(2, 4, 6)
    return torch_call(lambda x: F.glu(x, dim=dim), x), jax.nn.glu(x, axis=axis)


def gradient(one, other, x: np.ndarray) -> Pair:
    """Of the sum of a function's values, in both frameworks."""
    tensor = torch.from_numpy(x).requires_grad_()
    one(tensor).sum().backward()
    return tensor.grad, jax.grad(lambda x: other(x).sum())(jnp.asarray(x))


def _corner(name: str, other_name: str, one, other, x, changed=None, change: str = "", note: str = "") -> Row:
    x = np.asarray(x, float)
    return Row(
        FAMILY,
        f"`{name}, gradient",
        f"`{other_name}`, gradient",
        "jax.nn" if other_name.startswith("jax") else "jax.numpy",
        lambda: gradient(one, other, x),
        None if changed is None else lambda: gradient(one, changed, x),
        change,
        note,
        claim="equal" if changed is None else "after",
    )


def _clamp(x):
    """With a gradient of 1 at the bounds."""
    return jnp.where((x >= -1) & (x <= 1), x, jax.lax.stop_gradient(jnp.clip(x, -1, 1)))


def _norm(x):
    """With a gradient of 0 at 0."""
    squares = (x**2).sum()
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _first_largest(x):
    return x[jnp.argmax(x)]


ROWS = [
    _both(
        "F.gelu(x)",
        "jax.nn.gelu(x)",
        F.gelu,
        jax.nn.gelu,
        lambda x: jax.nn.gelu(x, approximate=False),
        "`approximate=False`",
    ),
    Row(
        FAMILY,
        'F.gelu(x, approximate="tanh")',
        "jax.nn.gelu(x)",
        "jax.nn",
        _pair(lambda x: F.gelu(x, approximate="tanh"), jax.nn.gelu),
    ),
    *(
        Row(FAMILY, f"F.{one}(x)", f"jax.nn.{other}(x)", "jax.nn", _pair(getattr(F, one), getattr(jax.nn, other)))
        for one, other in SAME.items()
    ),
    _both(
        "nn.ELU(alpha=0.5)",
        "jax.nn.elu(x)",
        torch.nn.ELU(0.5),
        jax.nn.elu,
        lambda x: jax.nn.elu(x, 0.5),
        "`alpha=0.5`",
    ),
    _both(
        "nn.CELU(alpha=0.5)",
        "jax.nn.celu(x)",
        torch.nn.CELU(0.5),
        jax.nn.celu,
        lambda x: jax.nn.celu(x, 0.5),
        "`alpha=0.5`",
    ),
    _both(
        "nn.LeakyReLU(0.2)",
        "jax.nn.leaky_relu(x)",
        torch.nn.LeakyReLU(0.2),
        jax.nn.leaky_relu,
        lambda x: jax.nn.leaky_relu(x, 0.2),
        "`negative_slope=0.2`",
    ),
    _both(
        "nn.Hardtanh(0, 2)",
        "jax.nn.hard_tanh(x)",
        torch.nn.Hardtanh(0, 2),
        jax.nn.hard_tanh,
        lambda x: jnp.clip(x, 0, 2),
        "`jnp.clip(x, 0, 2)`",
    ),
    _both(
        "`nn.Softplus()`, inputs to 30",
        "jax.nn.softplus(x)",
        F.softplus,
        jax.nn.softplus,
        lambda x: jnp.where(x > 20, x, jax.nn.softplus(x)),
        "`jnp.where(x > 20, x, softplus(x))`",
        "the threshold",
        x=np.linspace(-30, 30, 97),
    ),
    _both(
        "nn.Softplus(beta=2)",
        "jax.nn.softplus(x)",
        torch.nn.Softplus(beta=2),
        jax.nn.softplus,
        lambda x: jax.nn.softplus(2 * x) / 2,
        "`softplus(2 * x) / 2`",
    ),
    _formula("F.tanhshrink(x)", "x - jnp.tanh(x)", F.tanhshrink, lambda x: x - jnp.tanh(x)),
    _formula(
        "F.softshrink(x)",
        "jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0)",
        F.softshrink,
        lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0),
    ),
    _formula(
        "F.hardshrink(x)",
        "jnp.where(jnp.abs(x) > 0.5, x, 0)",
        F.hardshrink,
        lambda x: jnp.where(jnp.abs(x) > 0.5, x, 0),
    ),
    Row(FAMILY, "nn.PReLU()", "PReLU()", "Flax", lambda: _prelu("Flax")),
    Row(FAMILY, "nn.PReLU()", "eqx.nn.PReLU()", "Equinox", lambda: _prelu("Equinox")),
    Row(
        FAMILY,
        "nn.PReLU(3)",
        "PReLU()",
        "Flax",
        lambda: _prelu_channels(by_hand=False),
        lambda: _prelu_channels(by_hand=True),
        "`jnp.where(x >= 0, x, slope * x)`",
        "Flax's has one slope for all channels",
        claim="after",
    ),
    Row(
        FAMILY, "F.softmax(x, dim=-1)", "jax.nn.softmax(x)", "jax.nn", _pair(lambda x: F.softmax(x, -1), jax.nn.softmax)
    ),
    Row(
        FAMILY,
        "`nn.Softmax()` on three axes",
        "jax.nn.softmax(x)",
        "jax.nn",
        lambda: _softmax(None),
        lambda: _softmax(0),
        "`axis=0`",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.log_softmax(x, dim=-1)",
        "jax.nn.log_softmax(x)",
        "jax.nn",
        _pair(lambda x: F.log_softmax(x, -1), jax.nn.log_softmax),
    ),
    Row(FAMILY, "F.glu(x)", "jax.nn.glu(x)", "jax.nn", lambda: _glu(-1, -1)),
    Row(
        FAMILY,
        "F.glu(x, dim=1)",
        "jax.nn.glu(x)",
        "jax.nn",
        lambda: _glu(1, -1),
        lambda: _glu(1, 1),
        "`axis=1`",
        claim="after",
    ),
    _corner("F.relu(x)` at 0", "jax.nn.relu(x)", F.relu, jax.nn.relu, [-1, 0, 1]),
    _corner("F.relu6(x)` at 0 and 6", "jax.nn.relu6(x)", F.relu6, jax.nn.relu6, [0, 3, 6]),
    _corner(
        "F.leaky_relu(x)` at 0",
        "jax.nn.leaky_relu(x)",
        F.leaky_relu,
        jax.nn.leaky_relu,
        [-1, 0, 1],
        lambda x: jnp.where(x > 0, x, 0.01 * x),
        "`jnp.where(x > 0, x, 0.01 * x)`",
        "the slope in PyTorch, 1 in JAX",
    ),
    _corner(
        "torch.abs(x)` at 0",
        "jnp.abs(x)",
        torch.abs,
        jnp.abs,
        [-1, 0, 1],
        lambda x: x * jax.lax.stop_gradient(jnp.sign(x)),
        "`x * stop_gradient(jnp.sign(x))`",
        "0 in PyTorch, 1 in JAX",
    ),
    _corner(
        "torch.clamp(x, -1, 1)` at the bounds",
        "jnp.clip(x, -1, 1)",
        lambda x: torch.clamp(x, -1, 1),
        lambda x: jnp.clip(x, -1, 1),
        [-2, -1, 0, 1],
        _clamp,
        "`jnp.where(inside or at a bound, x, stop_gradient(clip))`",
    ),
    _corner("torch.amax(x)` of equal values", "jnp.max(x)", torch.amax, jnp.max, [1, 3, 3]),
    _corner(
        "torch.max(x, dim=0)` of equal values",
        "jnp.max(x)",
        lambda x: torch.max(x, dim=0).values,
        jnp.max,
        [1, 3, 3],
        _first_largest,
        "`x[jnp.argmax(x)]`",
    ),
    _corner(
        "torch.linalg.vector_norm(x)` at 0",
        "jnp.linalg.norm(x)",
        torch.linalg.vector_norm,
        jnp.linalg.norm,
        [0, 0],
        _norm,
        "a `jnp.where` before and after the `jnp.sqrt`",
        "NaN in JAX",
    ),
]
