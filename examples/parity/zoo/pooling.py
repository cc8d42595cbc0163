"""Pooling, adaptive pooling too."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import lax

from .frameworks import data, torch_call
from .layouts import channels_first, channels_last
from .rows import Pair, Row

FAMILY = "pooling"
TITLE = "Pooling"

C = 3


def _image(height: int = 8, width: int = 6) -> np.ndarray:
    return data(2, C, height, width)


def _flax(module, pool, x: np.ndarray | None = None, **arguments) -> Pair:
    x = _image() if x is None else x
    return torch_call(module, x), channels_first(pool(jnp.asarray(channels_last(x)), **arguments))


def _equinox(module, layer, x: np.ndarray | None = None) -> Pair:
    x = _image() if x is None else x
    return torch_call(module, x), jax.vmap(layer)(jnp.asarray(x))


def _dilated(dilation: int) -> Pair:
    """lax.reduce_window, which Flax's function calls, has the argument that Flax's hasn't."""
    x = jnp.asarray(_image())
    output = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID", window_dilation=(1, 1, dilation, dilation)
    )
    return torch_call(torch.nn.MaxPool2d(2, dilation=2), _image()), output


def _ceil(by_hand: bool) -> Pair:
    module, x = torch.nn.MaxPool2d(3, stride=2, ceil_mode=True), _image()
    padding = ((0, 1), (0, 1)) if by_hand else "VALID"
    return _flax(module, nn.max_pool, x, window_shape=(3, 3), strides=(2, 2), padding=padding)


def _average_ceil(by_hand: bool) -> Pair:
    module, layer = torch.nn.AvgPool2d(3, stride=2, ceil_mode=True), eqx.nn.AvgPool2d(3, stride=2, use_ceil=True)
    reference, output = _equinox(module, layer)
    if by_hand:
        ones = jnp.ones((C, 8, 6))
        output = output / layer(ones)
    return reference, output


def _divisor(by_hand: bool) -> Pair:
    module = torch.nn.AvgPool2d(2, divisor_override=3)
    reference, output = _flax(module, nn.avg_pool, window_shape=(2, 2), strides=(2, 2))
    return reference, output * 4 / 3 if by_hand else output


def adaptive(reduce, x, size: tuple[int, int]) -> jax.Array:
    """Reduce with PyTorch's windows, from floor(i * n / size) to ceil((i + 1) * n / size), of the last two axes."""
    for axis, wanted in zip((-2, -1), size, strict=True):
        n = x.shape[axis]
        windows = [(i * n // wanted, -(-(i + 1) * n // wanted)) for i in range(wanted)]
        x = jnp.stack([reduce(lax.slice_in_dim(x, a, b, axis=axis), axis) for a, b in windows], axis)
    return x


def _adaptive_by_hand(module: torch.nn.Module, reduce) -> Pair:
    return torch_call(module, _image()), adaptive(reduce, jnp.asarray(_image()), module.output_size)


def _global_average() -> Pair:
    return torch_call(torch.nn.AdaptiveAvgPool2d(1), _image())[..., 0, 0], channels_last(_image()).mean((1, 2))


def _power(by_hand: bool) -> Pair:
    """Power-average pooling from an average: PyTorch sums instead of averaging."""
    x = jnp.abs(channels_last(_image()))
    factor = 4 if by_hand else 1
    output = (nn.avg_pool(x**2, (2, 2), (2, 2)) * factor) ** 0.5
    return torch_call(torch.nn.LPPool2d(2, 2), np.abs(_image())), channels_first(output)


def _ties() -> Pair:
    """The gradient where two values of a window are the largest."""
    x = np.round(_image())
    tensor, factor = torch.from_numpy(x).requires_grad_(), data(2, C, 4, 3)
    (F.max_pool2d(tensor, 2) * torch.from_numpy(factor)).sum().backward()

    def loss(y):
        return (nn.max_pool(y, (2, 2), (2, 2)) * channels_last(factor)).sum()

    return tensor.grad, channels_first(jax.grad(loss)(jnp.asarray(channels_last(x))))


ROWS = [
    Row(
        FAMILY,
        "nn.MaxPool2d(2)",
        "max_pool(x, (2, 2))",
        "Flax",
        lambda: _flax(torch.nn.MaxPool2d(2), nn.max_pool, window_shape=(2, 2)),
        lambda: _flax(torch.nn.MaxPool2d(2), nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
        "`strides=(2, 2)`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.MaxPool2d(2)",
        "eqx.nn.MaxPool2d(2)",
        "Equinox",
        lambda: _equinox(torch.nn.MaxPool2d(2), eqx.nn.MaxPool2d(2)),
        lambda: _equinox(torch.nn.MaxPool2d(2), eqx.nn.MaxPool2d(2, stride=2)),
        "`stride=2`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.MaxPool2d(3, stride=2, padding=1)",
        "max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))",
        "Flax",
        lambda: _flax(
            torch.nn.MaxPool2d(3, stride=2, padding=1),
            nn.max_pool,
            window_shape=(3, 3),
            strides=(2, 2),
            padding=((1, 1), (1, 1)),
        ),
        note="both pad with -inf",
    ),
    Row(
        FAMILY,
        "nn.MaxPool2d(3, stride=2, padding=1)",
        'max_pool(x, (3, 3), (2, 2), "SAME")',
        "Flax",
        lambda: _flax(
            torch.nn.MaxPool2d(3, stride=2, padding=1), nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME"
        ),
        lambda: _flax(
            torch.nn.MaxPool2d(3, stride=2, padding=1),
            nn.max_pool,
            window_shape=(3, 3),
            strides=(2, 2),
            padding=((1, 1), (1, 1)),
        ),
        "`padding=((1, 1), (1, 1))`",
        "the shape is the same",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.MaxPool2d(3, stride=2, padding=1)",
        "eqx.nn.MaxPool2d(3, stride=2, padding=1)",
        "Equinox",
        lambda: _equinox(torch.nn.MaxPool2d(3, stride=2, padding=1), eqx.nn.MaxPool2d(3, stride=2, padding=1)),
    ),
    Row(
        FAMILY,
        "nn.MaxPool2d(3, stride=2, ceil_mode=True)",
        "max_pool(x, (3, 3), (2, 2))",
        "Flax",
        lambda: _ceil(by_hand=False),
        lambda: _ceil(by_hand=True),
        "`padding=((0, 1), (0, 1))`, as much as is missing",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.MaxPool2d(3, stride=2, ceil_mode=True)",
        "eqx.nn.MaxPool2d(3, stride=2, use_ceil=True)",
        "Equinox",
        lambda: _equinox(torch.nn.MaxPool2d(3, stride=2, ceil_mode=True), eqx.nn.MaxPool2d(3, stride=2, use_ceil=True)),
    ),
    Row(
        FAMILY,
        "nn.MaxPool2d(2, dilation=2)",
        "lax.reduce_window(x, -inf, lax.max, ..)",
        "jax.lax",
        lambda: _dilated(1),
        lambda: _dilated(2),
        "`window_dilation=(1, 1, 2, 2)`",
        "`max_pool` and Equinox have no dilation",
        claim="after",
    ),
    Row(FAMILY, "`nn.MaxPool2d(2)`, gradient where values tie", "max_pool(x, (2, 2), (2, 2))", "Flax", _ties),
    Row(
        FAMILY,
        "nn.AvgPool2d(2)",
        "avg_pool(x, (2, 2))",
        "Flax",
        lambda: _flax(torch.nn.AvgPool2d(2), nn.avg_pool, window_shape=(2, 2)),
        lambda: _flax(torch.nn.AvgPool2d(2), nn.avg_pool, window_shape=(2, 2), strides=(2, 2)),
        "`strides=(2, 2)`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.AvgPool2d(2)",
        "eqx.nn.AvgPool2d(2)",
        "Equinox",
        lambda: _equinox(torch.nn.AvgPool2d(2), eqx.nn.AvgPool2d(2)),
        lambda: _equinox(torch.nn.AvgPool2d(2), eqx.nn.AvgPool2d(2, stride=2)),
        "`stride=2`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.AvgPool2d(3, stride=2, padding=1)",
        "avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))",
        "Flax",
        lambda: _flax(
            torch.nn.AvgPool2d(3, stride=2, padding=1),
            nn.avg_pool,
            window_shape=(3, 3),
            strides=(2, 2),
            padding=((1, 1), (1, 1)),
        ),
        note="both count the padding",
    ),
    Row(
        FAMILY,
        "nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)",
        "avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))",
        "Flax",
        lambda: _flax(
            torch.nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
            nn.avg_pool,
            window_shape=(3, 3),
            strides=(2, 2),
            padding=((1, 1), (1, 1)),
        ),
        lambda: _flax(
            torch.nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
            nn.avg_pool,
            window_shape=(3, 3),
            strides=(2, 2),
            padding=((1, 1), (1, 1)),
            count_include_pad=False,
        ),
        "`count_include_pad=False`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.AvgPool2d(3, stride=2, padding=1)",
        "eqx.nn.AvgPool2d(3, stride=2, padding=1)",
        "Equinox",
        lambda: _equinox(torch.nn.AvgPool2d(3, stride=2, padding=1), eqx.nn.AvgPool2d(3, stride=2, padding=1)),
        note="it has no `count_include_pad`",
    ),
    Row(
        FAMILY,
        "nn.AvgPool2d(3, stride=2, ceil_mode=True)",
        "eqx.nn.AvgPool2d(3, stride=2, use_ceil=True)",
        "Equinox",
        lambda: _average_ceil(by_hand=False),
        lambda: _average_ceil(by_hand=True),
        "`pool(x) / pool(ones)`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.AvgPool2d(2, divisor_override=3)",
        "avg_pool(x, (2, 2), (2, 2))",
        "Flax",
        lambda: _divisor(by_hand=False),
        lambda: _divisor(by_hand=True),
        "`* 4 / 3`",
        claim="after",
    ),
    Row(FAMILY, "nn.AdaptiveAvgPool2d(1)", "x.mean((1, 2))", "jax.numpy", _global_average),
    Row(
        FAMILY,
        "`nn.AdaptiveAvgPool2d((4, 3))` of 8 x 6",
        "eqx.nn.AdaptiveAvgPool2d((4, 3))",
        "Equinox",
        lambda: _equinox(torch.nn.AdaptiveAvgPool2d((4, 3)), eqx.nn.AdaptiveAvgPool2d((4, 3))),
    ),
    Row(
        FAMILY,
        "`nn.AdaptiveAvgPool2d((3, 4))` of 8 x 6",
        "eqx.nn.AdaptiveAvgPool2d((3, 4))",
        "Equinox",
        lambda: _equinox(torch.nn.AdaptiveAvgPool2d((3, 4)), eqx.nn.AdaptiveAvgPool2d((3, 4))),
        lambda: _adaptive_by_hand(torch.nn.AdaptiveAvgPool2d((3, 4)), jnp.mean),
        "means over `floor(i * n / size)` to `ceil((i + 1) * n / size)`, an axis at a time",
        "its windows don't overlap",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.AdaptiveMaxPool2d((3, 4))` of 8 x 6",
        "eqx.nn.AdaptiveMaxPool2d((3, 4))",
        "Equinox",
        lambda: _equinox(torch.nn.AdaptiveMaxPool2d((3, 4)), eqx.nn.AdaptiveMaxPool2d((3, 4))),
        lambda: _adaptive_by_hand(torch.nn.AdaptiveMaxPool2d((3, 4)), jnp.max),
        "maxima over the same windows",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.LPPool2d(2, 2)",
        "avg_pool(x**2, (2, 2), (2, 2)) ** 0.5",
        "Flax",
        lambda: _power(by_hand=False),
        lambda: _power(by_hand=True),
        "`* 4` under the root",
        "PyTorch sums",
        claim="after",
    ),
]
