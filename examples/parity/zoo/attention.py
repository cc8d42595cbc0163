"""Attention: the functions and the layers with projections."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx

from .frameworks import KEY, data, equinox_with, filled, linen_call, tensors, with_values
from .rows import Pair, Row

FAMILY = "attention"
TITLE = "Attention"

E, H, D = 8, 2, 4
B, T, S = 2, 5, 7

ALLOWED = np.tril(np.ones((T, T), bool))  # True: this query may look at this key


def _module(**arguments) -> torch.nn.MultiheadAttention:
    return filled(torch.nn.MultiheadAttention(E, H, batch_first=True, **arguments))


def _thirds(module: torch.nn.MultiheadAttention) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Weight and bias of the projections of q, k and v."""
    state = tensors(module)
    weights = np.split(state["in_proj_weight"], 3)
    biases = np.split(state["in_proj_bias"], 3) if "in_proj_bias" in state else [None] * 3
    return dict(zip(("query", "key", "value"), zip(weights, biases, strict=True), strict=True))


def _flax_values(module: torch.nn.MultiheadAttention) -> dict[str, np.ndarray]:
    values = {}
    for name, (weight, bias) in _thirds(module).items():
        values[f"{name}.kernel"] = weight.T.reshape(E, H, D)
        if bias is not None:
            values[f"{name}.bias"] = bias.reshape(H, D)
    values["out.kernel"] = module.out_proj.weight.detach().numpy().T.reshape(H, D, E)
    if module.out_proj.bias is not None:
        values["out.bias"] = module.out_proj.bias.detach().numpy()
    return values


def _inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return data(B, T, E, seed=1), data(B, S, E, seed=2), data(B, S, E, seed=3)


def _reference(module, q, k, v, **keywords) -> torch.Tensor:
    keywords = {"need_weights": False} | keywords
    return module(*(torch.from_numpy(value) for value in (q, k, v)), **keywords)[0]


def _nnx(sow: bool = False, bias: bool = True) -> Pair:
    module, inputs = _module(bias=bias), _inputs()
    layer = nnx.MultiHeadAttention(H, E, use_bias=bias, decode=False, rngs=nnx.Rngs(0))
    layer = with_values(layer, _flax_values(module))
    return _reference(module, *inputs), layer(*(jnp.asarray(value) for value in inputs), sow_weights=sow)


def _linen() -> Pair:
    module, inputs = _module(), _inputs()
    layer = nn.MultiHeadDotProductAttention(H)
    return _reference(module, *inputs), linen_call(layer, _flax_values(module), *inputs)


def _equinox_layer(module: torch.nn.MultiheadAttention, bias: bool = True) -> eqx.nn.MultiheadAttention:
    names = [f"use_{part}_bias" for part in ("query", "key", "value", "output")]
    layer = eqx.nn.MultiheadAttention(H, E, **dict.fromkeys(names, bias), key=KEY)
    values = {}
    for name, (weight, third) in _thirds(module).items():
        values |= {f"{name}_proj.weight": weight, f"{name}_proj.bias": third}
    values |= {f"output_proj.{name}": value for name, value in tensors(module.out_proj).items()}
    return equinox_with(layer, {name: value for name, value in values.items() if bias or not name.endswith("bias")})


def _equinox(bias: bool) -> Pair:
    module, inputs = _module(), _inputs()
    layer = _equinox_layer(module, bias)
    return _reference(module, *inputs), jax.vmap(layer)(*(jnp.asarray(value) for value in inputs))


def _attend(module: torch.nn.MultiheadAttention, x: np.ndarray, mask: np.ndarray) -> list:
    """Self-attention of NNX, Linen and Equinox under a mask (batch or 1, time or 1, time)."""
    mask, x = jnp.asarray(np.broadcast_to(mask, (B, T, T))), jnp.asarray(x)
    layer = with_values(nnx.MultiHeadAttention(H, E, decode=False, rngs=nnx.Rngs(0)), _flax_values(module))
    return [
        layer(x, mask=mask[:, None], sow_weights=True),
        linen_call(nn.MultiHeadDotProductAttention(H), _flax_values(module), x, mask=mask[:, None]),
        jax.vmap(_equinox_layer(module))(x, x, x, mask),
    ]


def _masked(invert: bool) -> Pair:
    """The mask of nn.MultiheadAttention is True where looking is forbidden."""
    module, x = _module(), data(B, T, E)
    reference = _reference(module, x, x, x, attn_mask=torch.from_numpy(~ALLOWED))
    return reference, _attend(module, x, (ALLOWED if invert else ~ALLOWED)[None])


def _padded(invert: bool) -> Pair:
    module, x = _module(), data(B, T, E)
    padding = np.arange(T) >= np.array([[3], [4]])
    reference = _reference(module, x, x, x, key_padding_mask=torch.from_numpy(padding))
    return reference, _attend(module, x, (~padding if invert else padding)[:, None])


def _nothing_allowed(**keywords) -> Pair:
    module, x = _module(), data(B, T, E)
    allowed = ALLOWED.copy()
    allowed[0] = False
    reference = _reference(module, x, x, x, attn_mask=torch.from_numpy(~allowed), **keywords)
    return reference, _attend(module, x, allowed[None])


def _time_first(swap: bool) -> Pair:
    """nn.MultiheadAttention as it is by default, on (batch, time, e) as Flax takes it."""
    module = filled(torch.nn.MultiheadAttention(E, H))
    x = data(B, T, E)
    tensor = torch.from_numpy(x)
    tensor = tensor.transpose(0, 1) if swap else tensor
    reference = module(tensor, tensor, tensor, need_weights=False)[0]
    reference = reference.transpose(0, 1) if swap else reference
    return reference, linen_call(nn.MultiHeadDotProductAttention(H), _flax_values(module), x)


# ---- the function without projections


def _heads(heads: int, length: int, seed: int) -> np.ndarray:
    return data(B, heads, length, D, seed=seed)


def _swapped(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.swapaxes(1, 2))


def _sdpa(
    candidate=jax.nn.dot_product_attention, *, heads: int = H, kv_heads: int = H, length: int = S, **keywords
) -> Pair:
    """F.scaled_dot_product_attention against a function on (batch, time, heads, d)."""
    q, k, v = _heads(heads, T, 1), _heads(kv_heads, length, 2), _heads(kv_heads, length, 3)
    theirs = dict(keywords)
    if "mask" in theirs:
        theirs["attn_mask"] = torch.from_numpy(theirs.pop("mask"))
    if kv_heads != heads:
        theirs["enable_gqa"] = True
    reference = F.scaled_dot_product_attention(*(torch.from_numpy(value) for value in (q, k, v)), **theirs)
    output = candidate(_swapped(q), _swapped(k), _swapped(v), **keywords)
    return reference, output.swapaxes(1, 2)


def _plain(q, k, v, *, mask=None, is_causal: bool = False, scale: float | None = None):
    """Attention in the dtype of its inputs, with zeros where a query may look at nothing."""
    k, v = (jnp.repeat(value, q.shape[2] // value.shape[2], axis=2) for value in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(jnp.isnan(weights), 0, weights), v)


def _sdpa_nothing_allowed(candidate=jax.nn.dot_product_attention) -> Pair:
    allowed = np.ones((T, S), bool)
    allowed[0] = False
    return _sdpa(candidate, mask=allowed)


def _unswapped(swap: bool) -> Pair:
    """As many heads as time steps, so that nothing complains."""
    q, k, v = (data(B, 4, 4, D, seed=seed) for seed in range(3))
    reference = F.scaled_dot_product_attention(*(torch.from_numpy(value) for value in (q, k, v)))
    if swap:
        return reference, _plain(_swapped(q), _swapped(k), _swapped(v)).swapaxes(1, 2)
    return reference, _plain(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))


PLAIN = "the formula in `jax.numpy`, in the inputs' dtype"

ROWS = [
    Row(
        FAMILY,
        "nn.MultiheadAttention(8, 2, batch_first=True)",
        "nnx.MultiHeadAttention(2, 8, decode=False)",
        "NNX",
        _nnx,
        lambda: _nnx(sow=True),
        "`layer(q, k, v, sow_weights=True)`",
        "otherwise the softmax is computed in float32",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.MultiheadAttention(8, 2, batch_first=True)",
        "nn.MultiHeadDotProductAttention(2)",
        "Linen",
        _linen,
    ),
    Row(
        FAMILY,
        "nn.MultiheadAttention(8, 2, batch_first=True)",
        "eqx.nn.MultiheadAttention(2, 8)",
        "Equinox",
        lambda: _equinox(bias=False),
        lambda: _equinox(bias=True),
        "`use_query_bias=True, use_key_bias=True, use_value_bias=True, use_output_bias=True`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.MultiheadAttention(8, 2, batch_first=True, bias=False)",
        "nnx.MultiHeadAttention(2, 8, use_bias=False, decode=False)",
        "NNX",
        lambda: _nnx(bias=False),
        lambda: _nnx(bias=False, sow=True),
        "`layer(q, k, v, sow_weights=True)`",
        "otherwise the softmax is computed in float32",
        claim="after",
    ),
    Row(
        FAMILY,
        "`nn.MultiheadAttention(8, 2)` on (batch, time, e)",
        "nn.MultiHeadDotProductAttention(2)",
        "Linen",
        lambda: _time_first(swap=False),
        lambda: _time_first(swap=True),
        "`batch_first=True` in PyTorch",
        claim="after",
    ),
    Row(
        FAMILY,
        "attention(x, x, x, attn_mask=mask)",
        "attention(x, mask=mask)",
        "Flax, Equinox",
        lambda: _masked(invert=False),
        lambda: _masked(invert=True),
        "`mask=~mask`",
        claim="after",
    ),
    Row(
        FAMILY,
        "attention(x, x, x, key_padding_mask=padding)",
        "attention(x, mask=padding[:, None, None, :])",
        "Flax, Equinox",
        lambda: _padded(invert=False),
        lambda: _padded(invert=True),
        "`mask=~padding[:, None, None, :]`",
        claim="after",
    ),
    Row(
        FAMILY,
        "`attention(x, x, x, attn_mask=mask)` where a query is allowed nothing",
        "attention(x, mask=~mask)",
        "Flax, Equinox",
        lambda: _nothing_allowed(need_weights=True),
        note="NaN in PyTorch, the mean of the values in JAX",
        claim="different",
    ),
    Row(
        FAMILY,
        "the same with `need_weights=False`",
        "attention(x, mask=~mask)",
        "Flax, Equinox",
        _nothing_allowed,
        note="zeros before the output projection in PyTorch, the mean of the values in JAX",
        claim="different",
    ),
    Row(
        FAMILY,
        "F.scaled_dot_product_attention(q, k, v)",
        "jax.nn.dot_product_attention(q, k, v)",
        "jax.nn",
        _sdpa,
        lambda: _sdpa(_plain),
        PLAIN,
        "the softmax is computed in float32, in `nnx.dot_product_attention` too",
        claim="after",
    ),
    Row(
        FAMILY,
        "`F.scaled_dot_product_attention(q, k, v)`, axes left where they are",
        "attention(q, k, v)",
        "jax.nn",
        lambda: _unswapped(swap=False),
        lambda: _unswapped(swap=True),
        "`swapaxes(1, 2)` before and after",
        claim="after",
    ),
    Row(
        FAMILY,
        "`F.scaled_dot_product_attention(q, k, v, is_causal=True)`, 5 queries and 7 keys",
        "jax.nn.dot_product_attention(q, k, v, is_causal=True)",
        "jax.nn",
        lambda: _sdpa(is_causal=True),
        lambda: _sdpa(_plain, is_causal=True),
        PLAIN,
        "both align the mask at the first key",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.scaled_dot_product_attention(q, k, v, enable_gqa=True)",
        "jax.nn.dot_product_attention(q, k, v)",
        "jax.nn",
        lambda: _sdpa(heads=4, kv_heads=2),
        lambda: _sdpa(_plain, heads=4, kv_heads=2),
        PLAIN,
        "both give neighbouring heads the same keys",
        claim="after",
    ),
    Row(
        FAMILY,
        "F.scaled_dot_product_attention(q, k, v, attn_mask=mask)",
        "jax.nn.dot_product_attention(q, k, v, mask=mask)",
        "jax.nn",
        lambda: _sdpa(mask=np.tril(np.ones((T, S), bool), 2)),
        lambda: _sdpa(_plain, mask=np.tril(np.ones((T, S), bool), 2)),
        PLAIN,
        "here True means allowed in both",
        claim="after",
    ),
    Row(
        FAMILY,
        "`F.scaled_dot_product_attention(q, k, v, attn_mask=mask)` where a query is allowed nothing",
        "jax.nn.dot_product_attention(q, k, v, mask=mask)",
        "jax.nn",
        _sdpa_nothing_allowed,
        lambda: _sdpa_nothing_allowed(_plain),
        PLAIN + ", with weights of 0 where they are NaN",
        "zeros in PyTorch, the mean of the values in JAX",
        claim="after",
    ),
]
