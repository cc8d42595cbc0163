"""JAX's primitives in numpy. Where a rule returns NotImplemented, JAX evaluates the operation."""

import functools
import math

import numpy as np
from scipy import special


def _plain(function):
    """A function of arrays alone."""

    def rule(*arguments, params, lifted):
        if any(getattr(a, "dtype", np.dtype(float)).kind not in "fiub" for a in arguments):
            return NotImplemented
        result = np.asarray(function(*arguments))
        # numpy's integer division of two types and the like may widen; JAX's never does.
        wanted = arguments[0].dtype
        return result.astype(wanted) if result.dtype != wanted and result.dtype.kind != "b" else result

    return rule


def _divide(a, b, *, params, lifted):
    return np.asarray(a / b) if a.dtype.kind == "f" else NotImplemented


def _integer_pow(x, *, params, lifted):
    y = params["y"]
    # By repeated multiplication, as XLA does: x * x is exact to half a digit where pow is not.
    result = functools.reduce(np.multiply, [x] * abs(y), np.ones((), x.dtype))
    return result if y >= 0 else 1 / result


def _convert(x, *, params, lifted):
    dtype = np.dtype(params["new_dtype"])
    if getattr(x, "dtype", np.dtype(float)).kind not in "fiub" or dtype.kind == "c":
        return NotImplemented
    if lifted and _is_floating(dtype):
        return np.asarray(x, np.float64)
    if dtype.kind in "iu" and x.dtype.kind == "f":
        return np.trunc(np.nan_to_num(x)).astype(dtype)
    return np.asarray(x).astype(dtype)


def _is_floating(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def _broadcast(x, *sizes, params, lifted):
    if sizes:
        return NotImplemented
    shape, into = params["shape"], params["broadcast_dimensions"]
    x = np.asarray(x)
    return np.broadcast_to(x.reshape([x.shape[into.index(d)] if d in into else 1 for d in range(len(shape))]), shape)


def _reshape(x, *sizes, params, lifted):
    return np.asarray(x).reshape(params["new_sizes"]) if not sizes and params["dimensions"] is None else NotImplemented


def _slice(x, *, params, lifted):
    strides = params["strides"] or [None] * x.ndim
    starts, limits = params["start_indices"], params["limit_indices"]
    return x[tuple(slice(*s) for s in zip(starts, limits, strides, strict=True))]


def _pad(x, value, *, params, lifted):
    config = params["padding_config"]
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
        return NotImplemented
    return np.pad(x, [(low, high) for low, high, _ in config], constant_values=value)


def _reduce(function):
    def rule(x, *, params, lifted):
        result = np.asarray(function(x, axis=tuple(params["axes"])))
        return result.astype(x.dtype) if x.dtype.kind != "b" else result

    return rule


def _arg(function):
    def rule(x, *, params, lifted):
        return function(x, axis=params["axes"][0]).astype(params["index_dtype"])

    return rule


def _dot_general(a, b, *, params, lifted):
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        return NotImplemented
    free_a = [d for d in range(a.ndim) if d not in (*contract_a, *batch_a)]
    free_b = [d for d in range(b.ndim) if d not in (*contract_b, *batch_b)]
    batch = [a.shape[d] for d in batch_a]
    inner = math.prod(a.shape[d] for d in contract_a)
    left = a.transpose(*batch_a, *free_a, *contract_a).reshape(*batch, -1, inner)
    right = b.transpose(*batch_b, *contract_b, *free_b).reshape(*batch, inner, -1)
    shape = [*batch, *(a.shape[d] for d in free_a), *(b.shape[d] for d in free_b)]
    wanted = np.float64 if lifted else (params["preferred_element_type"] or np.result_type(a, b))
    return np.matmul(left, right).reshape(shape).astype(wanted)


def _gather(x, indices, *, params, lifted):
    """Rows of a table; other ways to gather are left to JAX."""
    d, width = params["dimension_numbers"], x.shape[1:]
    rows = np.asarray(indices)[..., 0]
    plain = d.collapsed_slice_dims == d.start_index_map == (0,) and not d.operand_batching_dims
    last = tuple(range(rows.ndim, rows.ndim + len(width)))
    if not plain or params["slice_sizes"] != (1, *width) or d.offset_dims != last or x.dtype.kind != "f":
        return NotImplemented
    if rows.size and not 0 <= rows.min() <= rows.max() < len(x):
        return NotImplemented
    return x[rows]


def _select(which, *cases, params, lifted):
    if which.dtype.kind == "b":
        return np.where(which, cases[1], cases[0])
    return np.choose(which, cases) if which.ndim == 0 or which.shape == cases[0].shape else NotImplemented


def _clamp(low, x, high, *, params, lifted):
    return np.clip(x, low, high).astype(x.dtype)


def _compare(function):
    def rule(a, b, *, params, lifted):
        plain = all(getattr(x, "dtype", np.dtype(float)).kind in "fiub" for x in (a, b))
        return np.asarray(function(a, b)) if plain else NotImplemented

    return rule


def _cumulative(function):
    def rule(x, *, params, lifted):
        axis = params["axis"]
        if params["reverse"]:
            return np.flip(function(np.flip(x, axis), axis=axis), axis).astype(x.dtype)
        return function(x, axis=axis).astype(x.dtype)

    return rule


def _iota(*sizes, params, lifted):
    dtype = np.dtype(params["dtype"])
    if sizes:
        return NotImplemented
    shape, axis = params["shape"], params["dimension"]
    counted = np.arange(shape[axis], dtype=np.float64 if lifted and _is_floating(dtype) else dtype)
    return np.broadcast_to(counted.reshape([-1 if d == axis else 1 for d in range(len(shape))]), shape)


def _from_one(*, params, lifted):
    return _iota(params=params, lifted=lifted) + 1


def _split(x, *, params, lifted):
    ends = np.cumsum(params["sizes"])[:-1]
    return list(np.split(x, ends, axis=params["axis"]))


RULES = {
    **{
        name: _plain(function)
        for name, function in {
            "abs": np.abs,
            "add": np.add,
            "add_any": np.add,
            "and": np.bitwise_and,
            "atan2": np.arctan2,
            "cbrt": np.cbrt,
            "ceil": np.ceil,
            "copy": np.copy,
            "copy_p": np.copy,
            "cos": np.cos,
            "cosh": np.cosh,
            "erf": special.erf,
            "erf_inv": special.erfinv,
            "erfc": special.erfc,
            "exp": np.exp,
            "exp2": np.exp2,
            "expm1": np.expm1,
            "floor": np.floor,
            "log": np.log,
            "log1p": np.log1p,
            "logistic": special.expit,
            "max": np.maximum,
            "min": np.minimum,
            "mul": np.multiply,
            "neg": np.negative,
            "not": np.invert,
            "or": np.bitwise_or,
            "pow": np.power,
            "rsqrt": lambda x: 1 / np.sqrt(x),
            "sign": np.sign,
            "sin": np.sin,
            "sinh": np.sinh,
            "sqrt": np.sqrt,
            "square": np.square,
            "stop_gradient": lambda x: x,
            "sub": np.subtract,
            "tan": np.tan,
            "tanh": np.tanh,
            "xor": np.bitwise_xor,
        }.items()
    },
    **{
        name: _compare(function)
        for name, function in {
            "eq": np.equal,
            "ne": np.not_equal,
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
        }.items()
    },
    "reduce_sum": _reduce(np.sum),
    "reduce_max": _reduce(np.max),
    "reduce_min": _reduce(np.min),
    "reduce_prod": _reduce(np.prod),
    "reduce_and": _reduce(np.all),
    "reduce_or": _reduce(np.any),
    "argmax": _arg(np.argmax),
    "argmin": _arg(np.argmin),
    "cumsum": _cumulative(np.cumsum),
    "cumprod": _cumulative(np.cumprod),
    "div": _divide,
    "integer_pow": _integer_pow,
    "convert_element_type": _convert,
    "reduce_precision": lambda x, *, params, lifted: x if lifted else NotImplemented,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": lambda x, *, params, lifted: np.transpose(x, params["permutation"]),
    "squeeze": lambda x, *, params, lifted: np.squeeze(x, tuple(params["dimensions"])),
    "expand_dims": lambda x, *, params, lifted: np.expand_dims(x, tuple(params["dimensions"])),
    "rev": lambda x, *, params, lifted: np.flip(x, tuple(params["dimensions"])),
    "concatenate": lambda *xs, params, lifted: np.concatenate(xs, axis=params["dimension"]),
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "dot_general": _dot_general,
    "gather": _gather,
    "select_n": _select,
    "clamp": _clamp,
    "is_finite": lambda x, *, params, lifted: np.isfinite(x),
    "iota": _iota,
    "iota_from_one": _from_one,  # no primitive of JAX: a mutant of iota
    "row": lambda x, *, params, lifted: x[params["index"]],
    "optimization_barrier": lambda *xs, params, lifted: list(xs),
    "rows": lambda *xs, params, lifted: np.stack(xs),
}
