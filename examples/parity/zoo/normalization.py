"""Batch, layer, group, instance and RMS norm."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from .frameworks import data, equinox_call, equinox_with, filled, flax_calls, nested, tensors, torch_call, with_values
from .layouts import channels_first, channels_last
from .rows import Pair, Row

FAMILY = "normalization"
TITLE = "Normalization"

C = 6


def _image(scale: float = 1.0) -> np.ndarray:
    return data(4, C, 5, 3, scale=scale) + 0.5


def _affine(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Flax's scale and bias."""
    names = {"weight": "scale", "bias": "bias"}
    return {names[name]: value for name, value in tensors(module).items() if name in names}


# ---- layer norm and RMS norm


def _layer_norm(torch_arguments: dict | None = None, x: np.ndarray | None = None, **arguments) -> Pair:
    module = filled(torch.nn.LayerNorm(C, **(torch_arguments or {})))
    x = data(3, C) * 0.7 if x is None else x
    layers = nnx.LayerNorm(C, **arguments, rngs=nnx.Rngs(0)), nn.LayerNorm(**arguments)
    return torch_call(module, x), flax_calls(*layers, _affine(module), x)


def _layer_norm_equinox() -> Pair:
    module, x = filled(torch.nn.LayerNorm(C)), data(3, C) * 0.7
    return torch_call(module, x), equinox_call(eqx.nn.LayerNorm(C), tensors(module), x)


def _layer_norm_two_axes(**arguments) -> Pair:
    module, x = filled(torch.nn.LayerNorm((4, 5))), data(3, 4, 5)
    layer = nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1), **arguments)
    return torch_call(module, x), layer.apply({"params": nested(_affine(module))}, x)


def _layer_norm_two_axes_nnx(**arguments) -> Pair:
    module, x = filled(torch.nn.LayerNorm((4, 5))), data(3, 4, 5)
    layer = nnx.LayerNorm(20, reduction_axes=(-2, -1), feature_axes=(-2, -1), **arguments, rngs=nnx.Rngs(0))
    flat = {name: value.reshape(-1) for name, value in _affine(module).items()}
    return torch_call(module, x), with_values(layer, flat)(jnp.asarray(x))


def _layer_norm_two_axes_equinox() -> Pair:
    module, x = filled(torch.nn.LayerNorm((4, 5))), data(3, 4, 5)
    return torch_call(module, x), equinox_call(eqx.nn.LayerNorm((4, 5)), tensors(module), x)


def _standardize() -> Pair:
    x = data(3, C)
    return torch_call(lambda x: torch.nn.functional.layer_norm(x, (C,)), x), jax.nn.standardize(jnp.asarray(x))


def _rms_norm(torch_eps: float | None = None, **arguments) -> Pair:
    module, x = filled(torch.nn.RMSNorm(C, eps=torch_eps)), data(3, C) * 0.3
    layers = nnx.RMSNorm(C, **arguments, rngs=nnx.Rngs(0)), nn.RMSNorm(**arguments)
    return torch_call(module, x), flax_calls(*layers, _affine(module), x)


def _rms_norm_equinox(**arguments) -> Pair:
    module, x = filled(torch.nn.RMSNorm(C)), data(3, C) * 0.3
    return torch_call(module, x), equinox_call(eqx.nn.RMSNorm(C, **arguments), tensors(module), x)


# ---- group norm and instance norm


def _group_norm(**arguments) -> Pair:
    module, x = filled(torch.nn.GroupNorm(3, C)), _image()
    layers = nnx.GroupNorm(C, num_groups=3, **arguments, rngs=nnx.Rngs(0)), nn.GroupNorm(num_groups=3, **arguments)
    return torch_call(module, x), [channels_first(y) for y in flax_calls(*layers, _affine(module), channels_last(x))]


def _group_norm_equinox() -> Pair:
    module, x = filled(torch.nn.GroupNorm(3, C)), _image()
    return torch_call(module, x), equinox_call(eqx.nn.GroupNorm(3, C), tensors(module), x)


def _instance_norm(torch_arguments: dict | None = None, **arguments) -> Pair:
    module, x = filled(torch.nn.InstanceNorm2d(C, **(torch_arguments or {}))), _image()
    layers = nnx.InstanceNorm(C, **arguments, rngs=nnx.Rngs(0)), nn.InstanceNorm(**arguments)
    return torch_call(module, x), [channels_first(y) for y in flax_calls(*layers, _affine(module), channels_last(x))]


def _instance_norm_equinox() -> Pair:
    module, x = filled(torch.nn.InstanceNorm2d(C)), _image()
    layer = eqx.nn.GroupNorm(C, C, channelwise_affine=False)
    return torch_call(module, x), equinox_call(layer, {}, x)


# ---- batch norm


def _statistics(module: torch.nn.Module) -> dict[str, np.ndarray]:
    state = tensors(module)
    return {"mean": state["running_mean"], "var": state["running_var"]}


def _batch_norm_eval() -> Pair:
    module, x = filled(torch.nn.BatchNorm2d(C)), _image()
    layer = with_values(nnx.BatchNorm(C, rngs=nnx.Rngs(0)), _affine(module) | _statistics(module))
    variables = {"params": nested(_affine(module)), "batch_stats": nested(_statistics(module))}
    outputs = [
        layer(channels_last(x), use_running_average=True),
        nn.BatchNorm(use_running_average=True).apply(variables, channels_last(x)),
    ]
    return torch_call(module, x), [channels_first(y) for y in outputs]


def _batch_norm_train() -> Pair:
    module, x = filled(torch.nn.BatchNorm2d(C)).train(), _image()
    layer = with_values(nnx.BatchNorm(C, rngs=nnx.Rngs(0)), _affine(module) | _statistics(module))
    variables = {"params": nested(_affine(module)), "batch_stats": nested(_statistics(module))}
    linen, _ = nn.BatchNorm(use_running_average=False).apply(variables, channels_last(x), mutable="batch_stats")
    return torch_call(module, x), [channels_first(layer(channels_last(x))), channels_first(linen)]


def _batch_norm_untracked(average: bool) -> Pair:
    """In evaluation: the batch's own statistics, where PyTorch tracks none."""
    module, x = filled(torch.nn.BatchNorm2d(C, track_running_stats=False)), _image()
    layer = with_values(nnx.BatchNorm(C, rngs=nnx.Rngs(0)), _affine(module))
    return torch_call(module, x), channels_first(layer(channels_last(x), use_running_average=average))


def _batches() -> list[np.ndarray]:
    return [data(3, C, 2, 2, seed=seed) * 1.5 + 0.3 for seed in range(4)]


def _torch_statistics(**arguments) -> dict[str, np.ndarray]:
    """Running statistics after four steps of training."""
    module = filled(torch.nn.BatchNorm2d(C, **arguments)).train()
    for x in _batches():
        torch_call(module, x)
    return _statistics(module)


def _nnx_statistics(momentum: float | None = 0.99, bessel: bool = False) -> dict[str, np.ndarray]:
    """The same of NNX, whose statistics are made float64 first; momentum None sets 1 - 1/t in step t."""
    module = filled(torch.nn.BatchNorm2d(C))
    layer = with_values(nnx.BatchNorm(C, momentum=momentum or 0.0, rngs=nnx.Rngs(0)), _statistics(module))
    for step, x in enumerate(_batches(), start=1):
        if momentum is None:
            layer.momentum = 1 - 1 / step
        before, n = layer.var[...], x.size // C
        layer(channels_last(x), use_running_average=False)
        if bessel:
            batch = layer.var[...] - layer.momentum * before
            layer.var[...] = layer.momentum * before + batch * n / (n - 1)
    return {"mean": layer.mean[...], "var": layer.var[...]}


def _linen_statistics(momentum: float = 0.99) -> dict[str, np.ndarray]:
    module = filled(torch.nn.BatchNorm2d(C))
    variables = {"params": nested(_affine(module)), "batch_stats": nested(_statistics(module))}
    layer = nn.BatchNorm(use_running_average=False, momentum=momentum)
    for x in _batches():
        _, changed = layer.apply(variables, channels_last(x), mutable="batch_stats")
        variables = variables | changed
    return variables["batch_stats"]


def _running(name: str, torch_arguments: dict | None = None, **arguments) -> Pair:
    reference = _torch_statistics(**(torch_arguments or {}))
    candidates = [_nnx_statistics(**arguments)]
    if set(arguments) <= {"momentum"} and arguments.get("momentum", 0.99) is not None:
        candidates.append(_linen_statistics(**arguments))
    return reference[name], [candidate[name] for candidate in candidates]


def _fresh_nnx(param_dtype) -> Pair:
    """The running mean of a layer that was made new, not written over: its dtype is NNX's own choice."""
    module = torch.nn.BatchNorm2d(C).double().train()
    layer = nnx.BatchNorm(C, momentum=0.9, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    for x in _batches():
        torch_call(module, x)
        layer(channels_last(x), use_running_average=False)
    return module.running_mean, layer.mean[...]


def _fresh_nnx_widened() -> Pair:
    module = torch.nn.BatchNorm2d(C).double().train()
    layer = nnx.BatchNorm(C, momentum=0.9, rngs=nnx.Rngs(0))
    layer.mean.set_value(jnp.zeros(C, jnp.float64))
    for x in _batches():
        torch_call(module, x)
        layer(channels_last(x), use_running_average=False)
    return module.running_mean, layer.mean[...]


class _EquinoxBatchNorm:
    """Equinox's batch norm with a module's weights, and its statistics if it is given any."""

    def __init__(self, module: torch.nn.Module, statistics: dict | None, settled: bool = False, **arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the default mode is the old one
            layer, self.state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(C, axis_name="batch", **arguments)
        self.layer = equinox_with(layer, {name: tensors(module)[name] for name in ("weight", "bias")})
        self.index = layer.ema_state_index if layer.mode == "ema" else layer.batch_state_index
        if statistics is not None:
            self.state = self.state.set(self.index, tuple(jnp.asarray(value) for value in statistics.values()))
        if layer.mode == "ema":
            self.state = self.state.set(layer.ema_first_time_index, jnp.array(statistics is None))
        if settled:
            self.state = self.state.set(layer.batch_counter, jnp.array(10**6))

    def __call__(self, x: np.ndarray, inference: bool) -> jax.Array:
        def one(x, state):
            return self.layer(x, state, inference=inference)

        one = jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, self.state = one(jnp.asarray(x), self.state)
        return y

    def statistics(self) -> dict[str, jax.Array]:
        return dict(zip(("mean", "var"), self.state.get(self.index), strict=True))


def _equinox_eval() -> Pair:
    module, x = filled(torch.nn.BatchNorm2d(C)), _image()
    return torch_call(module, x), _EquinoxBatchNorm(module, _statistics(module))(x, inference=True)


def _equinox_train(**arguments) -> Pair:
    module, x = filled(torch.nn.BatchNorm2d(C)), _image()
    layer = _EquinoxBatchNorm(module, _statistics(module), **arguments)
    return torch_call(module.train(), x), layer(x, inference=False)


def _equinox_running(name: str, bessel: bool = False, **arguments) -> Pair:
    """The statistics after one step from PyTorch's."""
    module, x = filled(torch.nn.BatchNorm2d(C)), _batches()[0]
    layer = _EquinoxBatchNorm(module, _statistics(module), mode="batch", **arguments)
    before, n = _statistics(module)[name], x.size // C
    torch_call(module.train(), x)
    layer(x, inference=False)
    after = layer.statistics()[name]
    return _statistics(module)[name], 0.9 * before + (after - 0.9 * before) * n / (n - 1) if bessel else after


def _equinox_eval_after_a_step(new: bool, settled: bool) -> Pair:
    """A step of training, then evaluation. Bessel's correction is taken out of PyTorch's variance."""
    module, x = torch.nn.BatchNorm2d(C).double() if new else filled(torch.nn.BatchNorm2d(C)), _batches()[0]
    layer = _EquinoxBatchNorm(module, None if new else _statistics(module), settled, mode="batch", momentum=0.9)
    before, n = module.running_var.clone(), x.size // C
    torch_call(module.train(), x)
    module.running_var.copy_(0.9 * before + (module.running_var - 0.9 * before) * (n - 1) / n)
    layer(x, inference=False)
    return torch_call(module.eval(), x), layer(x, inference=True)


LARGE_MEAN = data(3, C) + 1000.0

ROWS = [
    Row(
        FAMILY,
        "nn.LayerNorm(6)",
        "LayerNorm()",
        "Flax",
        _layer_norm,
        lambda: _layer_norm(epsilon=1e-5),
        "`epsilon=1e-5`",
        claim="after",
    ),
    Row(FAMILY, "nn.LayerNorm(6)", "eqx.nn.LayerNorm(6)", "Equinox", _layer_norm_equinox),
    Row(
        FAMILY,
        "nn.LayerNorm(6, bias=False)",
        "LayerNorm(use_bias=False)",
        "Flax",
        lambda: _layer_norm({"bias": False}, use_bias=False),
        lambda: _layer_norm({"bias": False}, use_bias=False, epsilon=1e-5),
        "`epsilon=1e-5`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.LayerNorm(6, elementwise_affine=False)",
        "LayerNorm(use_scale=False, use_bias=False)",
        "Flax",
        lambda: _layer_norm({"elementwise_affine": False}, use_scale=False, use_bias=False),
        lambda: _layer_norm({"elementwise_affine": False}, use_scale=False, use_bias=False, epsilon=1e-5),
        "`epsilon=1e-5`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.LayerNorm(6)`, inputs of mean 1000",
        "LayerNorm(epsilon=1e-5)",
        "Flax",
        lambda: _layer_norm(x=LARGE_MEAN, epsilon=1e-5),
        lambda: _layer_norm(x=LARGE_MEAN, epsilon=1e-5, use_fast_variance=False),
        "`use_fast_variance=False`",
        "in float32 the same inputs leave hardly a digit right",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.LayerNorm((4, 5))",
        "nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1))",
        "Linen",
        _layer_norm_two_axes,
        lambda: _layer_norm_two_axes(epsilon=1e-5),
        "`epsilon=1e-5`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.LayerNorm((4, 5))",
        "nnx.LayerNorm(20, reduction_axes=(-2, -1), feature_axes=(-2, -1))",
        "NNX",
        _layer_norm_two_axes_nnx,
        lambda: _layer_norm_two_axes_nnx(epsilon=1e-5),
        "`epsilon=1e-5`",
        "`scale = weight.reshape(-1)`: it holds one axis",
        claim="after",
    ),
    Row(FAMILY, "nn.LayerNorm((4, 5))", "eqx.nn.LayerNorm((4, 5))", "Equinox", _layer_norm_two_axes_equinox),
    Row(FAMILY, "F.layer_norm(x, (6,))", "jax.nn.standardize(x)", "jax.nn", _standardize),
    Row(
        FAMILY,
        "nn.RMSNorm(6)",
        "RMSNorm()",
        "Flax",
        _rms_norm,
        lambda: _rms_norm(epsilon=float(jnp.finfo(jnp.float64).eps)),
        "`epsilon=jnp.finfo(x.dtype).eps`",
        claim="after",
    ),
    Row(FAMILY, "nn.RMSNorm(6, eps=1e-6)", "RMSNorm()", "Flax", lambda: _rms_norm(1e-6)),
    Row(
        FAMILY,
        "nn.RMSNorm(6)",
        "eqx.nn.RMSNorm(6)",
        "Equinox",
        _rms_norm_equinox,
        lambda: _rms_norm_equinox(eps=float(jnp.finfo(jnp.float64).eps), use_bias=False),
        "`eps=jnp.finfo(x.dtype).eps, use_bias=False`",
        "it has a bias, at first 0, which PyTorch's hasn't",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.GroupNorm(3, 6)",
        "GroupNorm(num_groups=3)",
        "Flax",
        _group_norm,
        lambda: _group_norm(epsilon=1e-5),
        "`epsilon=1e-5`",
        "`num_groups` is 32 if it is left out",
        claim="after",
    ),
    Row(FAMILY, "nn.GroupNorm(3, 6)", "eqx.nn.GroupNorm(3, 6)", "Equinox", _group_norm_equinox),
    Row(
        FAMILY,
        "nn.InstanceNorm2d(6)",
        "InstanceNorm(use_scale=False, use_bias=False)",
        "Flax",
        lambda: _instance_norm(use_scale=False, use_bias=False),
        lambda: _instance_norm(use_scale=False, use_bias=False, epsilon=1e-5),
        "`epsilon=1e-5`",
        "PyTorch's has no weight unless `affine=True`; Flax's has",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.InstanceNorm2d(6, affine=True)",
        "InstanceNorm()",
        "Flax",
        lambda: _instance_norm({"affine": True}),
        lambda: _instance_norm({"affine": True}, epsilon=1e-5),
        "`epsilon=1e-5`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.InstanceNorm2d(6)",
        "eqx.nn.GroupNorm(6, 6, channelwise_affine=False)",
        "Equinox",
        _instance_norm_equinox,
        note="a group a channel",
    ),
    Row(FAMILY, "nn.BatchNorm2d(6).eval()", "BatchNorm(use_running_average=True)", "Flax", _batch_norm_eval),
    Row(FAMILY, "nn.BatchNorm2d(6).eval()", "eqx.nn.BatchNorm(6, axis_name)", "Equinox", _equinox_eval),
    Row(FAMILY, "`nn.BatchNorm2d(6).train()`, output", "BatchNorm()", "Flax", _batch_norm_train),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6).train()`, output",
        "eqx.nn.BatchNorm(6, axis_name)",
        "Equinox",
        _equinox_train,
        lambda: _equinox_train(mode="batch"),
        '`mode="batch"`',
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6)`, running_mean after 4 steps",
        "`BatchNorm()`, mean",
        "Flax",
        lambda: _running("mean"),
        lambda: _running("mean", momentum=0.9),
        "`momentum=0.9`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6)`, running_var after 4 steps of 12 values a channel",
        "`BatchNorm(momentum=0.9)`, var",
        "Flax",
        lambda: _running("var", momentum=0.9),
        lambda: _running("var", momentum=0.9, bessel=True),
        "after every step `var = 0.9 * old + (var - 0.9 * old) * n / (n - 1)`",
        "Bessel's correction; no argument asks for it",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6, momentum=None)`, running_mean after 4 steps",
        "`BatchNorm()`, mean",
        "NNX",
        lambda: _running("mean", {"momentum": None}),
        lambda: _running("mean", {"momentum": None}, momentum=None),
        "before step t `layer.momentum = 1 - 1 / t`",
        "None is the average over all batches",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6)`, running_mean of a new layer",
        "`nnx.BatchNorm(6, momentum=0.9, param_dtype=float64)`, mean",
        "NNX",
        lambda: _fresh_nnx(jnp.float64),
        _fresh_nnx_widened,
        "`layer.mean.set_value(layer.mean[...].astype(float64))`, `var` too",
        "NNX keeps its statistics in float32, whatever `param_dtype` says",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.BatchNorm2d(6, track_running_stats=False).eval()",
        "BatchNorm(use_running_average=True)",
        "NNX",
        lambda: _batch_norm_untracked(average=True),
        lambda: _batch_norm_untracked(average=False),
        "`use_running_average=False` in evaluation too",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6)`, running_mean after a step",
        '`eqx.nn.BatchNorm(6, axis_name, mode="batch")`, mean',
        "Equinox",
        lambda: _equinox_running("mean"),
        lambda: _equinox_running("mean", momentum=0.9),
        "`momentum=0.9`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6)`, running_var after a step of 12 values a channel",
        '`eqx.nn.BatchNorm(6, axis_name, mode="batch", momentum=0.9)`, var',
        "Equinox",
        lambda: _equinox_running("var", momentum=0.9),
        lambda: _equinox_running("var", bessel=True, momentum=0.9),
        "after every step `var = 0.9 * old + (var - 0.9 * old) * n / (n - 1)` in the state",
        "Bessel's correction; no argument asks for it",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6)`: trained statistics, one step more, then `eval()`",
        'eqx.nn.BatchNorm(6, axis_name, mode="batch", momentum=0.9)',
        "Equinox",
        lambda: _equinox_eval_after_a_step(new=False, settled=False),
        lambda: _equinox_eval_after_a_step(new=False, settled=True),
        "`state.set(layer.batch_counter, jnp.array(10**6))` with the statistics",
        "evaluation divides them by `1 - momentum**steps`, counted from the port on (without Bessel's correction)",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.BatchNorm2d(6)`: new, one step, then `eval()`",
        'eqx.nn.BatchNorm(6, axis_name, mode="batch", momentum=0.9)',
        "Equinox",
        lambda: _equinox_eval_after_a_step(new=True, settled=False),
        lambda: _equinox_eval_after_a_step(new=True, settled=True),
        "`state.set(layer.batch_counter, jnp.array(10**6))` at the start",
        "the variance starts at 1 and is corrected as if it had started at 0 (without Bessel's correction)",
        claim="after",
    ),
]
