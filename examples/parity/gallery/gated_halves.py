"""Gate and value of a gated linear unit: one projection holds both, and the port activates the wrong half.

A network over sets of features that mixes tokens and channels, ported to Equinox. Thread: ml-explore/mlx-lm#767
(`silu(x) * gate` for `silu(gate) * x`).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

FEATURES, WIDTH, HIDDEN, TOKENS, LAYERS, CLASSES = 7, 12, 20, 6, 2, 5
HINT = r"(?i)gate|GLU|half|halves"


class GatedUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, 2 * HIDDEN)
        self.out = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * nn.functional.gelu(gate))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.tokens = nn.Linear(TOKENS, TOKENS)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.unit = GatedUnit()

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.unit(self.norm2(x))


class MixerNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(FEATURES, WIDTH)
        self.layers = nn.ModuleList(Mixer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))


def gated(first, second):
    return jax.nn.gelu(first, approximate=False) * second  # BUG: the gate is the second half


def mended_gated(first, second):
    return first * jax.nn.gelu(second, approximate=False)


class JaxGatedUnit(eqx.Module):
    proj: eqx.nn.Linear
    out: eqx.nn.Linear
    mended: bool = eqx.field(static=True)

    def __init__(self, mended, key):
        proj, out = jax.random.split(key)
        self.proj = eqx.nn.Linear(WIDTH, 2 * HIDDEN, key=proj)
        self.out = eqx.nn.Linear(HIDDEN, WIDTH, key=out)
        self.mended = mended

    def __call__(self, x):
        first, second = jnp.split(jax.vmap(self.proj)(x), 2, axis=-1)
        hidden = mended_gated(first, second) if self.mended else gated(first, second)
        return jax.vmap(self.out)(hidden)


class JaxMixer(eqx.Module):
    norm1: eqx.nn.LayerNorm
    tokens: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    unit: JaxGatedUnit

    def __init__(self, mended, key):
        tokens, unit = jax.random.split(key)
        self.norm1 = eqx.nn.LayerNorm(WIDTH)
        self.tokens = eqx.nn.Linear(TOKENS, TOKENS, key=tokens)
        self.norm2 = eqx.nn.LayerNorm(WIDTH)
        self.unit = JaxGatedUnit(mended, unit)

    def __call__(self, x):
        x = x + jax.vmap(self.tokens)(jax.vmap(self.norm1)(x).T).T
        return x + self.unit(jax.vmap(self.norm2)(x))


class JaxMixerNetwork(eqx.Module):
    stem: eqx.nn.Linear
    layers: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, mended, key):
        stem, layers, head = jax.random.split(key, 3)
        self.stem = eqx.nn.Linear(FEATURES, WIDTH, key=stem)
        self.layers = [JaxMixer(mended, part) for part in jax.random.split(layers, LAYERS)]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=head)

    def example(self, x):
        x = jax.vmap(self.stem)(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(jax.vmap(self.norm)(x).mean(axis=0))

    def __call__(self, x):
        return jax.vmap(self.example)(x)


def blank(shapes):
    """The model with weights of zero; `parity.compare` writes them."""
    arrays, rest = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return eqx.combine(jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), arrays), rest)


def make_reference():
    torch.manual_seed(0)
    return MixerNetwork()


def make_candidate():
    return blank(eqx.filter_eval_shape(JaxMixerNetwork, False, jax.random.key(0)))


def make_mended():
    return blank(eqx.filter_eval_shape(JaxMixerNetwork, True, jax.random.key(0)))


def inputs():
    return np.random.default_rng(0).standard_normal((2, TOKENS, FEATURES))
