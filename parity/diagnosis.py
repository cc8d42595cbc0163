"""What a difference usually is: the values before it, taken through well-known mistakes, until one fits.

Each hypothesis computes a value from those that still agree, in numpy. If one side has what the configuration asks for
and the other what a mistake gives, the mistake is named.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from gpt2_core.config import ModelConfig
from parity.places import Place

Values = Mapping[str, np.ndarray]

_FITS = 1e-9  # relative; far above rounding, far below any difference between two formulas


def hint(places: list[Place], limit: float, ours: Values, theirs: Values, config: ModelConfig) -> str:
    """«; looks like erf GELU against tanh GELU» or nothing."""
    first = next(place.name for place in places if not place.difference <= limit)
    kind = first.partition(".")[2].partition(".")[2] if first.startswith("h.") else first
    prefix = first.removesuffix(kind)
    for mistake, right, wrong in _HYPOTHESES.get(kind, ()):
        try:
            expected, suspected = (formula(theirs, prefix, config) for formula in (right, wrong))
        except KeyError:
            continue
        for name, value, other in (("JAX", ours[first], theirs[first]), ("PyTorch", theirs[first], ours[first])):
            if _fits(value, suspected) and _fits(other, expected):
                return f"; {name} looks like {mistake}"
    return ""


def _fits(value: np.ndarray, formula: np.ndarray) -> bool:
    return value.shape == formula.shape and np.abs(value - formula).max() <= _FITS * np.abs(formula).max()


Formula = Callable[[Values, str, ModelConfig], np.ndarray]


def _gelu_tanh(v: Values, h: str, config: ModelConfig) -> np.ndarray:
    x = v[h + "mlp.c_fc"]
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_erf(v: Values, h: str, config: ModelConfig) -> np.ndarray:
    x = v[h + "mlp.c_fc"]
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _gelu_sigmoid(v: Values, h: str, config: ModelConfig) -> np.ndarray:
    x = v[h + "mlp.c_fc"]
    return x / (1 + np.exp(-1.702 * x))


def _relu(v: Values, h: str, config: ModelConfig) -> np.ndarray:
    return np.maximum(v[h + "mlp.c_fc"], 0.0)


def _attention(scale: str = "head", mask: int = 0, axis: int = -1, fill: float = -math.inf) -> Formula:
    def formula(v: Values, h: str, config: ModelConfig) -> np.ndarray:
        q, k, values = (v[f"{h}attn.{name}"] for name in "qkv")
        T = q.shape[2]
        divisor = {"head": math.sqrt(config.head_size), "none": 1.0, "embedding": math.sqrt(config.n_embd)}[scale]
        scores = q @ k.swapaxes(-1, -2) / divisor
        seen = np.tril(np.ones((T, T), bool), mask)
        seen[0, 0] = True
        scores = np.where(seen, scores, fill if fill == -math.inf else scores + fill)
        weights = np.exp(scores - scores.max(axis=axis, keepdims=True))
        weights = weights / weights.sum(axis=axis, keepdims=True)
        return (weights @ values).swapaxes(1, 2).reshape(*q.shape[:1], T, -1)

    return formula


_RIGHT = _attention()
_HYPOTHESES: dict[str, tuple[tuple[str, Formula, Formula], ...]] = {
    "mlp.activation": (
        ("erf GELU against tanh GELU", _gelu_tanh, _gelu_erf),
        ("tanh GELU against erf GELU", _gelu_erf, _gelu_tanh),
        ("the sigmoid approximation of GELU", _gelu_tanh, _gelu_sigmoid),
        ("ReLU against GELU", _gelu_tanh, _relu),
    ),
    "attn.out": (
        ("attention without its scale", _RIGHT, _attention(scale="none")),
        ("attention scaled by the embedding's width in the place of the head's", _RIGHT, _attention(scale="embedding")),
        ("a causal mask that lets a token see the next", _RIGHT, _attention(mask=1)),
        ("a causal mask that hides a token from itself", _RIGHT, _attention(mask=-1)),
        ("a softmax over the queries in the place of the keys", _RIGHT, _attention(axis=-2)),
        ("an additive mask of -10,000", _RIGHT, _attention(fill=-1e4)),
    ),
}
