"""What a difference usually is: the values before it, taken through the configured formula and well-known mistakes.

Each formula computes one value, in numpy, from those that still agree. The side that has what the configuration asks
for is right; the other departs, and if what it has is what a known mistake gives, the mistake is named.

Shapes: B batch, T time, D embedding, H heads, K head size, F MLP width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from gpt2_core.config import ModelConfig
from gpt2_core.weights import Weights
from parity.engine.divergence import Divergence

Values = Mapping[str, np.ndarray]

_FITS = 1e-11  # relative; above rounding, far below any difference between two formulas


class Site(NamedTuple):
    """Where a formula computes, and from what."""

    values: Values
    """Those before it, on which both sides agree."""
    block: str
    """'h.2.', or nothing outside of the blocks."""
    kind: str
    """The value's name in its block: 'mlp.activation'."""
    weights: Weights
    tokens_BT: np.ndarray

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    def value(self, name: str) -> np.ndarray:
        return self.values[self.block + name]

    def weight(self, name: str) -> np.ndarray:
        return self.weights.arrays[self.block + name].astype(np.float64)

    def bias(self, name: str) -> np.ndarray | float:
        return self.weight(name) if self.block + name in self.weights.arrays else 0.0


Formula = Callable[[Site], np.ndarray]


def hint(
    found: list[Divergence],
    limit: float,
    ours: Values,
    theirs: Values,
    names: tuple[str, str],
    weights: Weights,
    tokens_BT: np.ndarray,
) -> str:
    """'; JAX looks like tanh GELU, and the configuration asks for mlp gelu_exact'.

    Nothing where no formula is known, or both sides have what it gives.

    `ours` and `theirs` are the values of a forward pass on `tokens_BT`, in which `found` was found; `names` are those
    of the two sides.
    """
    first = next(d.name for d in found if not d.difference <= limit)
    if first not in ours or first not in theirs or ours[first].shape != theirs[first].shape:
        return ""
    kind = first.partition(".")[2].partition(".")[2] if first.startswith("h.") else first
    if kind not in FORMULAS:
        return ""
    site = Site(theirs, first.removesuffix(kind), kind, weights, tokens_BT)
    formula, asks, mistakes = FORMULAS[kind]
    expected = _computed(formula, site)
    if expected is None:
        return ""
    departing = [
        (name, values[first])
        for name, values in zip(names, (ours, theirs), strict=True)
        if not _fits(values[first], expected)
    ]
    if not departing:
        return ""
    settings = ", ".join(f"{name} {getattr(site.config, name)}" for name in asks)
    right = f"what the configuration asks for ({settings})" if asks else "GPT-2's formula"
    if len(departing) == 2:
        return f"; neither {names[0]} nor {names[1]} has {right}"
    ((side, value),) = departing
    for mistake, wrong in mistakes.items():
        suspected = _computed(wrong, site)
        if suspected is not None and _fits(value, suspected):
            asked = f", and the configuration asks for {settings}" if asks else ""
            return f"; {side} looks like {mistake}{asked}"
    return f"; {side} departs from {right}"


def _computed(formula: Formula, site: Site) -> np.ndarray | None:
    """Nothing where a value or a weight that the formula needs isn't there, or has no shape for it."""
    try:
        return formula(site)
    except (KeyError, ValueError):
        return None


def _fits(value: np.ndarray, formula: np.ndarray) -> bool:
    return value.shape == formula.shape and np.abs(value - formula).max() <= _FITS * np.abs(formula).max()


# --- one formula for each value; the keyword arguments are the mistakes


def _embeddings(at: Site, *, first: int = 0, positions: bool = True, scaled: str = "nothing") -> np.ndarray:
    tokens_BTD, factor = at.weight("wte.weight")[at.tokens_BT], math.sqrt(at.config.n_embd)
    if scaled == "tokens":
        tokens_BTD = tokens_BTD * factor
    if at.config.position == "learned" and positions:
        wpe = at.weight("wpe.weight")
        tokens_BTD = tokens_BTD + wpe[np.minimum(np.arange(first, first + at.tokens_BT.shape[1]), len(wpe) - 1)]
    return tokens_BTD * factor if scaled == "all" else tokens_BTD


def _stream(at: Site) -> np.ndarray:
    """The residual stream before the value."""
    number = int(at.block.split(".")[1]) if at.block else at.config.n_layer
    if at.kind in ("ln_2", "residual_2", "mlp.c_proj"):
        return at.value("residual_1")
    return at.values["embeddings" if number == 0 else f"h.{number - 1}.residual_2"]


def _norm(
    at: Site,
    *,
    kind: str | None = None,
    epsilon: float | None = None,
    unbiased: int = 0,
    bias: bool = True,
    weight: bool = True,
    offset: float = 0.0,
) -> np.ndarray:
    x = _stream(at)
    epsilon = at.config.layer_norm_epsilon if epsilon is None else epsilon
    w_D = at.weight(f"{at.kind}.weight") + offset if weight else 1.0
    if (kind or at.config.norm) == "rmsnorm":
        return _rms(x, epsilon) * w_D
    normalized = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True, ddof=unbiased) + epsilon)
    return normalized * w_D + (at.bias(f"{at.kind}.bias") if bias else 0.0)


def _rms(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)


def _heads(
    at: Site,
    *,
    part: str | None = None,
    bias: bool = True,
    transposed: bool = False,
    columns: bool = False,
    rope: bool | None = None,
    theta: float | None = None,
    pairs: str | None = None,
    first: int = 0,
    norm: bool | None = None,
    norm_after_rope: bool = False,
) -> np.ndarray:
    """q, k or v (B, H, T, K)."""
    config, own = at.config, at.kind.removeprefix("attn.")
    D, H, K = config.n_embd, config.n_head, config.head_size
    which = slice("qkv".index(part or own) * D, ("qkv".index(part or own) + 1) * D)
    w_DD, b_D = at.weight("attn.c_attn.weight")[:, which], at.bias("attn.c_attn.bias")
    x = at.value("ln_1") @ (w_DD.T if transposed else w_DD)
    x = x + np.broadcast_to(b_D, 3 * D)[which] if bias else x
    x = x.reshape(*x.shape[:2], K, H).swapaxes(2, 3) if columns else x.reshape(*x.shape[:2], H, K)

    def normed(x: np.ndarray) -> np.ndarray:
        if own == "v" or not (config.qk_norm if norm is None else norm):
            return x
        return _rms(x, config.layer_norm_epsilon) * at.weight(f"attn.{own}_norm.weight")

    def turned(x: np.ndarray) -> np.ndarray:
        if own == "v" or not (config.position == "rope" if rope is None else rope):
            return x
        return _rotated(x, theta or config.rope_theta, pairs or config.rope_pairs, first)

    x = x.swapaxes(1, 2)
    return normed(turned(x)) if norm_after_rope else turned(normed(x))


def _rotated(x_BHTK: np.ndarray, theta: float, pairs: str, first: int) -> np.ndarray:
    T, K = x_BHTK.shape[-2:]
    angles = np.arange(first, first + T)[:, None] * theta ** (-np.arange(0, K, 2) / K)
    features = np.arange(K).reshape(2, -1) if pairs == "half" else np.arange(K).reshape(-1, 2).T
    a, b = x_BHTK[..., features[0]], x_BHTK[..., features[1]]
    out = np.empty_like(x_BHTK)
    out[..., features[0]] = a * np.cos(angles) - b * np.sin(angles)
    out[..., features[1]] = b * np.cos(angles) + a * np.sin(angles)
    return out


def _slopes(n: int) -> np.ndarray:
    """ALiBi's (Press et al. 2022), of n heads: those beyond a power of two lie between the others."""
    power = 2 ** int(math.log2(n))
    head = np.arange(n)
    return np.where(head < power, 2.0 ** (-8 * (head + 1) / power), 2.0 ** (-8 * (head - power + 0.5) / power))


def _attention(
    at: Site,
    *,
    scale: str = "head",
    mask: int = 0,
    axis: int = -1,
    fill: float = -math.inf,
    names: str = "qkv",
    slopes: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
    q, k, v = (at.value(f"attn.{name}") for name in names)
    T, config = q.shape[2], at.config
    divisor = {
        "head": math.sqrt(config.head_size),
        "none": 1.0,
        "embedding": math.sqrt(config.n_embd),
        "square": config.head_size,
    }[scale]
    scores = q @ k.swapaxes(-1, -2) / divisor
    if slopes is not None or config.position == "alibi":
        slopes_H11 = (slopes or _slopes)(config.n_head)[:, None, None]
        scores = scores - slopes_H11 * (np.arange(T)[:, None] - np.arange(T))
    seen = np.tril(np.ones((T, T), bool), mask)
    seen[0, 0] = True
    scores = np.where(seen, scores, fill if fill == -math.inf else scores + fill)
    weights = np.exp(scores - scores.max(axis=axis, keepdims=True))
    weights = weights / weights.sum(axis=axis, keepdims=True)
    return (weights @ v).swapaxes(1, 2).reshape(len(q), T, -1)


_INPUTS = {
    "attn.c_proj": "attn.out",
    "mlp.c_fc": "ln_2",
    "mlp.c_gate": "ln_2",
    "mlp.c_proj": "mlp.activation",
}


def _linear(at: Site, *, bias: bool = True, transposed: bool = False, other: str | None = None) -> np.ndarray:
    name = other or at.kind
    w = at.weight(f"{name}.weight")
    return at.value(_INPUTS[at.kind]) @ (w.T if transposed else w) + (at.bias(f"{name}.bias") if bias else 0.0)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _silu(x: np.ndarray, slope: float = 1.0) -> np.ndarray:
    return x / (1 + np.exp(-slope * x))


def _activation(at: Site, *, function: Callable[[np.ndarray], np.ndarray] | None = None, swapped: bool = False):
    """The function of c_fc, or of the gate times c_fc."""
    a_BTF = at.value("mlp.c_fc")
    if at.config.mlp != "swiglu":
        return (function or {"gelu_tanh": gelu_tanh, "gelu_exact": gelu_exact}[at.config.mlp])(a_BTF)
    gate_BTF = at.value("mlp.c_gate")
    gate_BTF, a_BTF = (a_BTF, gate_BTF) if swapped else (gate_BTF, a_BTF)
    return (function or _silu)(gate_BTF) * a_BTF


def _residual(at: Site, *, stream: str | None = None, added: bool = True) -> np.ndarray:
    branch, norm = ("attn.c_proj", "ln_1") if at.kind == "residual_1" else ("mlp.c_proj", "ln_2")
    return at.value(branch) + ((at.value(norm) if stream == "norm" else _stream(at)) if added else 0.0)


def _logits(at: Site, *, head: str | None = None, norm: bool = True) -> np.ndarray:
    head = head or ("wte.weight" if at.config.tie_embeddings else "lm_head.weight")
    return (at.value("ln_f") if norm else _stream(at)) @ at.weight(head).T


# --- for each value: its formula, the settings that decide it, and the classic mistakes


class _Row(NamedTuple):
    formula: Formula
    asks: tuple[str, ...]
    mistakes: dict[str, Formula]


_but = functools.partial

_NORM = _Row(
    _norm,
    ("norm", "layer_norm_epsilon"),
    {
        "no norm at all": _stream,
        **{f"a norm with epsilon {e:g}": _but(_norm, epsilon=e) for e in (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3)},
        "a norm by the unbiased variance": _but(_norm, unbiased=1),
        "a norm without its bias": _but(_norm, bias=False),
        "a norm without its weight": _but(_norm, weight=False),
        "a norm that multiplies by 1 + weight": _but(_norm, offset=1.0),
        "RMS norm": _but(_norm, kind="rmsnorm"),
        "layer norm": _but(_norm, kind="layernorm"),
    },
)
_LINEAR = _Row(
    _linear,
    ("bias",),
    {
        "a projection without its bias": _but(_linear, bias=False),
        "a projection by the transposed weight": _but(_linear, transposed=True),
    },
)
_GATED = _Row(
    _linear,
    ("bias", "mlp"),
    _LINEAR.mistakes | {f"the projection of {name}": _but(_linear, other=f"mlp.{name}") for name in ("c_fc", "c_gate")},
)
_HEADS = _Row(
    _heads,
    ("position", "rope_theta", "rope_pairs", "qk_norm"),
    {
        "a projection without its bias": _but(_heads, bias=False),
        "a projection by the transposed weight": _but(_heads, transposed=True),
        **{f"the projection of {name}": _but(_heads, part=name) for name in "qkv"},
        "heads taken as columns, (head size, heads)": _but(_heads, columns=True),
        "no rotary embeddings": _but(_heads, rope=False),
        "rotary embeddings": _but(_heads, rope=True),
        "rotary embeddings of interleaved pairs": _but(_heads, pairs="interleaved"),
        "rotary embeddings of half pairs": _but(_heads, pairs="half"),
        **{f"rotary embeddings of base {t:g}": _but(_heads, theta=t) for t in (1e4, 5e5, 1e6)},
        "rotary embeddings of positions from one": _but(_heads, first=1),
        "no query and key norm": _but(_heads, norm=False),
        "query and key norms after the rotary embeddings, not before": _but(_heads, norm_after_rope=True),
    },
)
_ATTENTION = _Row(
    _attention,
    (),
    {
        "attention without its scale": _but(_attention, scale="none"),
        "attention scaled by the embedding's width instead of the head's": _but(_attention, scale="embedding"),
        "attention divided by the head size instead of its root": _but(_attention, scale="square"),
        "a causal mask that lets a token see the next": _but(_attention, mask=1),
        "a causal mask that hides a token from itself": _but(_attention, mask=-1),
        "attention without a mask": _but(_attention, fill=0.0),
        "a softmax over the queries instead of the keys": _but(_attention, axis=-2),
        "an additive mask of -10,000": _but(_attention, fill=-1e4),
        "queries and keys swapped": _but(_attention, names="kqv"),
        "keys and values swapped": _but(_attention, names="qvk"),
        "attention without ALiBi's biases": _but(_attention, slopes=np.zeros),
        "attention with ALiBi's biases": _but(_attention, slopes=_slopes),
        "ALiBi's biases with the wrong sign": _but(_attention, slopes=lambda n: -_slopes(n)),
        "ALiBi's slopes from one": _but(_attention, slopes=lambda n: 2.0 ** (-8 * np.arange(n) / n)),
        "ALiBi's slopes by the rule for powers of two": _but(
            _attention, slopes=lambda n: 2.0 ** (-8 * np.arange(1, n + 1) / n)
        ),
    },
)
_ACTIVATION = _Row(
    _activation,
    ("mlp",),
    {
        "erf GELU": _but(_activation, function=gelu_exact),
        "tanh GELU": _but(_activation, function=gelu_tanh),
        "the sigmoid approximation of GELU": _but(_activation, function=_but(_silu, slope=1.702)),
        "SiLU": _but(_activation, function=_silu),
        "ReLU": _but(_activation, function=lambda x: np.maximum(x, 0.0)),
        "a sigmoid": _but(_activation, function=lambda x: 1 / (1 + np.exp(-x))),
        "no activation": _but(_activation, function=lambda x: x),
        "gate and value swapped": _but(_activation, swapped=True),
    },
)
_RESIDUAL = _Row(
    _residual,
    (),
    {
        "a residual taken from after the norm": _but(_residual, stream="norm"),
        "a residual connection left out": _but(_residual, added=False),
    },
)

FORMULAS: dict[str, _Row] = {
    "embeddings": _Row(
        _embeddings,
        ("position",),
        {
            "positions from one": _but(_embeddings, first=1),
            "positions from two": _but(_embeddings, first=2),
            "embeddings without positions": _but(_embeddings, positions=False),
            "token embeddings scaled by sqrt(n_embd)": _but(_embeddings, scaled="tokens"),
            "embeddings and positions scaled by sqrt(n_embd)": _but(_embeddings, scaled="all"),
        },
    ),
    **dict.fromkeys(("ln_1", "ln_2", "ln_f"), _NORM),
    **dict.fromkeys(("attn.q", "attn.k", "attn.v"), _HEADS),
    "attn.out": _ATTENTION,
    **dict.fromkeys(("attn.c_proj", "mlp.c_proj"), _LINEAR),
    **dict.fromkeys(("mlp.c_fc", "mlp.c_gate"), _GATED),
    "mlp.activation": _ACTIVATION,
    **dict.fromkeys(("residual_1", "residual_2"), _RESIDUAL),
    "logits": _Row(
        _logits,
        ("tie_embeddings",),
        {
            "a head that is the token embedding": _but(_logits, head="wte.weight"),
            "a head on what no norm has seen": _but(_logits, norm=False),
        },
    ),
}
