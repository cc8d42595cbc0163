"""Embeddings: rows of a table by index."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from .frameworks import KEY, data, equinox_call, filled, linen_call, tensors, with_values
from .rows import Pair, Row

FAMILY = "embedding"
TITLE = "Embeddings"

IDS = np.array([[1, 0, 2], [3, 2, 0]])


def _embedding(**arguments) -> torch.nn.Embedding:
    return filled(torch.nn.Embedding(5, 3, **arguments))


def _table(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {"embedding": tensors(module)["weight"]}


def _nnx(**arguments) -> Pair:
    module = _embedding()
    layer = with_values(nnx.Embed(5, 3, **arguments, rngs=nnx.Rngs(0)), _table(module))
    return module(torch.from_numpy(IDS)), layer(IDS)


def _linen() -> Pair:
    module = _embedding()
    return module(torch.from_numpy(IDS)), linen_call(nn.Embed(5, 3), _table(module), IDS)


def _equinox() -> Pair:
    module = _embedding()
    return module(torch.from_numpy(IDS)), equinox_call(eqx.nn.Embedding(5, 3, key=KEY), tensors(module), IDS, axes=2)


def _tied() -> Pair:
    module, x = _embedding(), data(2, 3)
    layer = with_values(nnx.Embed(5, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), _table(module))
    reference = torch.nn.functional.linear(torch.from_numpy(x), module.weight)
    linen = linen_call(nn.Embed(5, 3), _table(module), x, method="attend")
    return reference, [layer.attend(jnp.asarray(x)), linen]


# What each framework makes of IDS with a table.
LOOK_UPS = (
    lambda table: with_values(nnx.Embed(5, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), {"embedding": table})(IDS),
    lambda table: nn.Embed(5, 3).apply({"params": {"embedding": table}}, IDS),
    lambda table: jax.vmap(jax.vmap(eqx.nn.Embedding(weight=table)))(IDS),
)


def _padding(mask: bool) -> Pair:
    """Gradients of the table for a loss that uses every position."""
    module, factor = _embedding(padding_idx=0), data(2, 3, 3)
    (module(torch.from_numpy(IDS)) * torch.from_numpy(factor)).sum().backward()

    def gradient(look_up) -> jax.Array:
        def loss(table):
            rows = look_up(table)
            if mask:
                rows = jnp.where((IDS == 0)[..., None], jax.lax.stop_gradient(rows), rows)
            return (rows * factor).sum()

        return jax.grad(loss)(jnp.asarray(tensors(module)["weight"]))

    return module.weight.grad, [gradient(look_up) for look_up in LOOK_UPS]


def _max_norm(clip: bool) -> Pair:
    module = _embedding(max_norm=0.5)
    table = jnp.asarray(tensors(module)["weight"])
    if clip:
        norm = jnp.linalg.norm(table, axis=1, keepdims=True)
        table = jnp.where(norm > 0.5, table * (0.5 / (norm + 1e-7)), table)
    return module(torch.from_numpy(IDS)), [look_up(table) for look_up in LOOK_UPS]


def _bag() -> Pair:
    module = filled(torch.nn.EmbeddingBag(5, 3))
    return module(torch.from_numpy(IDS)), jnp.asarray(tensors(module)["weight"])[IDS].mean(1)


ROWS = [
    Row(
        FAMILY,
        "nn.Embedding(5, 3)",
        "nnx.Embed(5, 3)",
        "NNX",
        _nnx,
        lambda: _nnx(param_dtype=jnp.float64),
        "`param_dtype=float64`, or `layer.dtype = None`",
        "it computes in the dtype of the table that it was made with, whatever the table's is by now",
        claim="after",
    ),
    Row(FAMILY, "nn.Embedding(5, 3)", "nn.Embed(5, 3)", "Linen", _linen),
    Row(FAMILY, "nn.Embedding(5, 3)", "eqx.nn.Embedding(5, 3)", "Equinox", _equinox),
    Row(FAMILY, "F.linear(x, embedding.weight)", "embed.attend(x)", "Flax", _tied, note="tied output layer"),
    Row(
        FAMILY,
        "`nn.Embedding(5, 3, padding_idx=0)`, gradient of the table",
        "`Embed(5, 3)`, gradient of the table",
        "Flax, Equinox",
        lambda: _padding(mask=False),
        lambda: _padding(mask=True),
        "`jnp.where((ids == 0)[..., None], jax.lax.stop_gradient(rows), rows)`",
        claim="after",
    ),
    Row(
        FAMILY,
        "nn.Embedding(5, 3, max_norm=0.5)",
        "Embed(5, 3)",
        "Flax, Equinox",
        lambda: _max_norm(clip=False),
        lambda: _max_norm(clip=True),
        "scale rows of a norm above 0.5 by `0.5 / (norm + 1e-7)`",
        "PyTorch writes the shorter rows into the weight, in the forward pass",
        claim="after",
    ),
    Row(FAMILY, "nn.EmbeddingBag(5, 3)", "table[ids].mean(1)", "jax.numpy", _bag, note="no layer of its own"),
]
