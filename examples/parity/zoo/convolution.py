"""Convolutions: padding, stride, dilation, groups; and transposed convolutions."""

import functools

import equinox as eqx
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax

from .frameworks import KEY, data, equinox_call, filled, flax_calls, tensors, torch_call, with_values
from .layouts import channels_first, channels_last, flipped_kernel, kernel
from .rows import Pair, Row

FAMILY = "convolution"
TITLE = "Convolutions"

IN, OUT = 4, 6


def _conv(kind: type, window: int | tuple, **arguments) -> torch.nn.Module:
    return filled(kind(IN, OUT, window, **arguments))


def _space(module: torch.nn.Module, size: int = 0) -> np.ndarray:
    """An input with the module's number of axes: sizes 8, 7, 6, or all the same."""
    return data(2, IN, *((size,) * 3 if size else (8, 7, 6))[: module.weight.ndim - 2])


def _flax_conv(module: torch.nn.Module, x: np.ndarray, **arguments) -> Pair:
    """A convolution of PyTorch against both of Flax, with the arguments as Flax calls them."""
    weight = tensors(module)["weight"]
    window = weight.shape[2:]
    values = {"kernel": kernel(weight)} | ({"bias": tensors(module)["bias"]} if module.bias is not None else {})
    layers = nnx.Conv(IN, OUT, window, **arguments, rngs=nnx.Rngs(0)), nn.Conv(OUT, window, **arguments)
    return torch_call(module, x), [channels_first(y) for y in flax_calls(*layers, values, channels_last(x))]


def _equinox_conv(module: torch.nn.Module, x: np.ndarray, **arguments) -> Pair:
    weight = tensors(module)["weight"]
    layer = eqx.nn.Conv(weight.ndim - 2, IN, OUT, weight.shape[2:], **arguments, key=KEY)
    return torch_call(module, x), equinox_call(layer, tensors(module), x)


def _both(
    torch_arguments: dict,
    flax: dict,
    flax_change: dict | None,
    equinox: dict,
    equinox_change: dict | None = None,
    *,
    kind: type = torch.nn.Conv2d,
    window: int = 3,
    size: int = 0,
    note: str = "",
) -> list[Row]:
    """Rows of a convolution against Flax and against Equinox: arguments of each and, where these differ, the change."""
    axes = int(kind.__name__[-2])
    torch_name = f"nn.{kind.__name__}(4, 6, {window}{_spelled(torch_arguments)})"
    torch_name = f"`{torch_name}`, input {size} x {size}" if size else torch_name
    rows = []
    for framework, call, name, given, change in (
        ("Flax", _flax_conv, f"Conv(4, 6, {(window,) * axes}", flax, flax_change),
        ("Equinox", _equinox_conv, f"eqx.nn.{kind.__name__}(4, 6, {window}", equinox, equinox_change),
    ):

        def run(change: dict | None = None, call=call, given=given) -> Pair:
            module = _conv(kind, window, **torch_arguments)
            return call(module, _space(module, size), **given | (change or {}))

        rows.append(
            Row(
                FAMILY,
                torch_name,
                f"{name}{_spelled(given)})",
                framework,
                run,
                None if change is None else functools.partial(run, change),
                "" if change is None else f"`{_spelled(change).removeprefix(', ')}`",
                "" if change is None else note,
                claim="equal" if change is None else "after",
            )
        )
    return rows


def _spelled(arguments: dict) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments.items()).replace("'", '"')


def _padded(mode: str, by_hand: bool, amount: int | str = 2, window: int = 3, **arguments) -> Pair:
    """PyTorch's padding_mode against Flax's string, or against jnp.pad and VALID."""
    modes = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}
    module = _conv(torch.nn.Conv2d, window, padding=amount, padding_mode=mode)
    x = _space(module)
    if not by_hand:
        return _flax_conv(module, x, **arguments)
    wide = jnp.pad(jnp.asarray(channels_last(x)), ((0, 0), (amount,) * 2, (amount,) * 2, (0, 0)), mode=modes[mode])
    values = {"kernel": kernel(tensors(module)["weight"]), "bias": tensors(module)["bias"]}
    layers = (
        nnx.Conv(IN, OUT, (window,) * 2, padding="VALID", rngs=nnx.Rngs(0)),
        nn.Conv(OUT, (window,) * 2, padding="VALID"),
    )
    return torch_call(module, x), [channels_first(y) for y in flax_calls(*layers, values, wide)]


def _equinox_mode(mode: str) -> Pair:
    module = _conv(torch.nn.Conv2d, 3, padding=2, padding_mode=mode)
    return _equinox_conv(module, _space(module), padding=2, padding_mode=mode.upper())


# ---- transposed


def _flax_transposed(torch_arguments: dict, flip: bool = True, window: int = 3, **arguments) -> Pair:
    module = _conv(torch.nn.ConvTranspose2d, window, **torch_arguments)
    x, weight = _space(module), tensors(module)["weight"]
    if arguments.get("transpose_kernel"):
        value = kernel(weight)
    else:
        value = flipped_kernel(weight) if flip else np.moveaxis(weight, (0, 1), (-2, -1))
    values = {"kernel": value, "bias": tensors(module)["bias"]}
    layers = (
        nnx.ConvTranspose(IN, OUT, (window,) * 2, **arguments, rngs=nnx.Rngs(0)),
        nn.ConvTranspose(OUT, (window,) * 2, **arguments),
    )
    return torch_call(module, x), [channels_first(y) for y in flax_calls(*layers, values, channels_last(x))]


def _equinox_transposed(torch_arguments: dict, flip: bool = True) -> Pair:
    module = _conv(torch.nn.ConvTranspose2d, 3, **torch_arguments)
    x, weight = _space(module), tensors(module)["weight"]
    groups = torch_arguments.get("groups", 1)
    parts = [part.swapaxes(0, 1) for part in np.split(weight, groups)]
    weight = np.concatenate(parts)
    weight = weight[..., ::-1, ::-1] if flip else weight
    layer = eqx.nn.ConvTranspose2d(IN, OUT, 3, **torch_arguments, key=KEY)
    return torch_call(module, x), equinox_call(layer, {"weight": weight, "bias": tensors(module)["bias"]}, x)


def _transposed_groups() -> Pair:
    """Flax's has no groups: a layer a group, side by side."""
    module = _conv(torch.nn.ConvTranspose2d, 3, groups=2, stride=2, bias=False)
    x, weight = _space(module), tensors(module)["weight"]
    outputs = []
    for values, weights in zip(np.split(channels_last(x), 2, -1), np.split(weight, 2), strict=True):
        layer = nnx.ConvTranspose(2, 3, (3, 3), strides=2, padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
        outputs.append(with_values(layer, {"kernel": flipped_kernel(weights)})(jnp.asarray(values)))
    return torch_call(module, x), channels_first(jnp.concatenate(outputs, -1))


# ---- without weights


def _unfold() -> Pair:
    x = data(2, IN, 5, 6)
    reference = F.unfold(torch.from_numpy(x), 3)
    return reference, lax.conv_general_dilated_patches(jnp.asarray(x), (3, 3), (1, 1), "VALID").reshape(2, IN * 9, -1)


def _pixel_shuffle(torch_order: bool) -> Pair:
    """Depth to space on channels last; the channel index is (out, 2, 2) in PyTorch."""
    x = data(2, 8, 3, 4)
    y = jnp.asarray(channels_last(x))
    if torch_order:
        y = y.reshape(2, 3, 4, 2, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    else:
        y = y.reshape(2, 3, 4, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5)
    return F.pixel_shuffle(torch.from_numpy(x), 2), channels_first(y.reshape(2, 6, 8, 2))


ROWS = [
    *_both({}, {}, {"padding": 0}, {}, note='`"SAME"` if it is left out'),
    *_both({"padding": 1}, {"padding": 1}, None, {"padding": 1}),
    *_both({"padding": (1, 2)}, {"padding": (1, 2)}, None, {"padding": (1, 2)}),
    *_both({"padding": "valid"}, {"padding": "VALID"}, None, {"padding": "VALID"}),
    *_both({"padding": "same"}, {"padding": "SAME"}, None, {"padding": "SAME"}),
    *_both({"padding": "same"}, {"padding": "SAME"}, None, {"padding": "SAME"}, window=4),
    *_both(
        {"padding": "same", "dilation": 2},
        {"padding": "SAME", "kernel_dilation": 2},
        None,
        {"padding": "SAME", "dilation": 2},
    ),
    *_both(
        {"padding": 1, "stride": 2},
        {"padding": "SAME", "strides": 2},
        {"padding": 1},
        {"padding": "SAME", "stride": 2},
        {"padding": 1},
        size=8,
        note="the shape is the same",
    ),
    *_both(
        {"padding": 1, "stride": 2},
        {"padding": "SAME", "strides": 2},
        None,
        {"padding": "SAME", "stride": 2},
        size=7,
    ),
    *_both({"padding": 2, "dilation": 2}, {"padding": 2, "kernel_dilation": 2}, None, {"padding": 2, "dilation": 2}),
    *_both({"padding": 1, "groups": 2}, {"padding": 1, "feature_group_count": 2}, None, {"padding": 1, "groups": 2}),
    *_both({"padding": 1, "bias": False}, {"padding": 1, "use_bias": False}, None, {"padding": 1, "use_bias": False}),
    *_both({"padding": 1}, {"padding": 1}, None, {"padding": 1}, kind=torch.nn.Conv1d),
    *_both(
        {"stride": 2, "dilation": 2},
        {"padding": 0, "strides": 2, "kernel_dilation": 2},
        None,
        {"stride": 2, "dilation": 2},
        kind=torch.nn.Conv1d,
    ),
    *_both({"padding": 1}, {"padding": 1}, None, {"padding": 1}, kind=torch.nn.Conv3d),
    Row(
        FAMILY,
        'nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")',
        'Conv(4, 6, (3, 3), padding="CIRCULAR")',
        "Flax",
        lambda: _padded("circular", False, amount=1, padding="CIRCULAR"),
    ),
    Row(
        FAMILY,
        'nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular")',
        'Conv(4, 6, (4, 4), padding="CIRCULAR")',
        "Flax",
        lambda: _padded("circular", False, amount="same", window=4, padding="CIRCULAR"),
    ),
    Row(
        FAMILY,
        'nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular")',
        'Conv(4, 6, (3, 3), padding="CIRCULAR")',
        "Flax",
        lambda: _padded("circular", False, padding="CIRCULAR"),
        lambda: _padded("circular", True),
        '`jnp.pad(x, 2 each side, mode="wrap")`, `padding="VALID"`',
        claim="after",
    ),
    Row(
        FAMILY,
        'nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")',
        'Conv(4, 6, (3, 3), padding="REFLECT")',
        "Flax",
        lambda: _padded("reflect", False, amount=1, padding="REFLECT"),
    ),
    Row(
        FAMILY,
        'nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate")',
        "Conv(4, 6, (3, 3), padding=1)",
        "Flax",
        lambda: _padded("replicate", False, amount=1, padding=1),
        lambda: _padded("replicate", True, amount=1),
        '`jnp.pad(x, 1 each side, mode="edge")`, `padding="VALID"`',
        "there is no such mode",
        claim="after",
    ),
    *(
        Row(
            FAMILY,
            f'nn.Conv2d(4, 6, 3, padding=2, padding_mode="{mode}")',
            f'eqx.nn.Conv2d(4, 6, 3, padding=2, padding_mode="{mode.upper()}")',
            "Equinox",
            lambda mode=mode: _equinox_mode(mode),
        )
        for mode in ("circular", "reflect", "replicate")
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 3, stride=2)",
        '`ConvTranspose(4, 6, (3, 3), strides=(2, 2), padding="VALID")`, kernel not flipped',
        "Flax",
        lambda: _flax_transposed({"stride": 2}, flip=False, strides=(2, 2), padding="VALID"),
        lambda: _flax_transposed({"stride": 2}, strides=(2, 2), padding="VALID"),
        "flip the kernel's window",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 3, stride=2)",
        'ConvTranspose(4, 6, (3, 3), strides=(2, 2), padding="VALID", transpose_kernel=True)',
        "Flax",
        lambda: _flax_transposed({"stride": 2}, strides=(2, 2), padding="VALID", transpose_kernel=True),
        note="kernel (*window, out, in), not flipped",
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 3, stride=2)",
        "ConvTranspose(4, 6, (3, 3), strides=(2, 2))",
        "Flax",
        lambda: _flax_transposed({"stride": 2}, strides=(2, 2)),
        lambda: _flax_transposed({"stride": 2}, strides=(2, 2), padding="VALID"),
        '`padding="VALID"`',
        '`"SAME"` if it is left out',
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)",
        "ConvTranspose(4, 6, (3, 3), strides=(2, 2), padding=1)",
        "Flax",
        lambda: _flax_transposed({"stride": 2, "padding": 1}, strides=(2, 2), padding=1),
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1)",
        "ConvTranspose(4, 6, (4, 4), strides=(2, 2), padding=1)",
        "Flax",
        lambda: _flax_transposed({"stride": 2, "padding": 1}, window=4, strides=(2, 2), padding=1),
        lambda: _flax_transposed({"stride": 2, "padding": 1}, window=4, strides=(2, 2), padding=2),
        "`padding=4 - 1 - 1`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1)",
        'ConvTranspose(4, 6, (4, 4), strides=(2, 2), padding="SAME")',
        "Flax",
        lambda: _flax_transposed({"stride": 2, "padding": 1}, window=4, strides=(2, 2), padding="SAME"),
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)",
        'ConvTranspose(4, 6, (3, 3), strides=(2, 2), padding="SAME")',
        "Flax",
        lambda: _flax_transposed({"stride": 2, "padding": 1, "output_padding": 1}, strides=(2, 2), padding="SAME"),
        lambda: _flax_transposed(
            {"stride": 2, "padding": 1, "output_padding": 1}, strides=(2, 2), padding=((1, 2), (1, 2))
        ),
        "`padding=((1, 2), (1, 2))`",
        "the shape is the same",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 2, stride=3)",
        'ConvTranspose(4, 6, (2, 2), strides=(3, 3), padding="VALID")',
        "Flax",
        lambda: _flax_transposed({"stride": 3}, window=2, strides=(3, 3), padding="VALID"),
        lambda: _flax_transposed({"stride": 3}, window=2, strides=(3, 3), padding=1),
        "`padding=2 - 1`",
        '`"VALID"` is larger than PyTorch\'s where the stride is larger than the window',
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 3, dilation=2)",
        'ConvTranspose(4, 6, (3, 3), kernel_dilation=(2, 2), padding="VALID")',
        "Flax",
        lambda: _flax_transposed({"dilation": 2}, kernel_dilation=(2, 2), padding="VALID"),
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2)",
        'a `ConvTranspose(2, 3, (3, 3), strides=2, padding="VALID")` a group',
        "NNX",
        _transposed_groups,
        note="there is no argument for groups",
    ),
    Row(
        FAMILY,
        "nn.ConvTranspose2d(4, 6, 3, stride=2)",
        "`eqx.nn.ConvTranspose2d(4, 6, 3, stride=2)`, kernel not flipped",
        "Equinox",
        lambda: _equinox_transposed({"stride": 2}, flip=False),
        lambda: _equinox_transposed({"stride": 2}),
        "flip the window",
        claim="after",
    ),
    *(
        Row(
            FAMILY,
            f"nn.ConvTranspose2d(4, 6, 3{_spelled(arguments)})",
            f"eqx.nn.ConvTranspose2d(4, 6, 3{_spelled(arguments)})",
            "Equinox",
            lambda arguments=arguments: _equinox_transposed(arguments),
        )
        for arguments in (
            {"stride": 2, "padding": 1, "output_padding": 1},
            {"stride": 2, "groups": 2},
            {"padding": 1, "dilation": 2},
        )
    ),
    Row(FAMILY, "F.unfold(x, 3)", "lax.conv_general_dilated_patches(x, ..)", "jax.lax", _unfold),
    Row(
        FAMILY,
        "F.pixel_shuffle(x, 2)",
        "`reshape(b, h, w, 2, 2, c)`, on channels last",
        "jax.numpy",
        lambda: _pixel_shuffle(torch_order=False),
        lambda: _pixel_shuffle(torch_order=True),
        "`reshape(b, h, w, c, 2, 2).transpose(0, 1, 4, 2, 5, 3)`",
        "no function of its own; PyTorch's channels are (c, 2, 2)",
        claim="after",
    ),
]
