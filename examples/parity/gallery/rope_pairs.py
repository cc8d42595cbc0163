"""Pairs of rotary embeddings: the reference rotates neighbours (GPT-J, Llama), the port two halves (GPT-NeoX).

A small decoder, ported to Equinox. Threads: huggingface/transformers#25199, NVIDIA/TransformerEngine#655,
AI-Hypercomputer/maxtext#581.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

VOCABULARY, WIDTH, HEADS, LAYERS, TOKENS = 19, 16, 2, 2, 7
HEAD = WIDTH // HEADS
HINT = r"(?i)rotary|rope|interleav|neighbour|halves"


def rotate_neighbours(x):
    """x is (batch, heads, tokens, head width)."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2, dtype=x.dtype) / HEAD)
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (part(x).reshape(batch, tokens, HEADS, HEAD).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate_neighbours(q), rotate_neighbours(k)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.RMSNorm(WIDTH, eps=1e-5)
        self.attention = Attention()
        self.norm2 = nn.RMSNorm(WIDTH, eps=1e-5)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.silu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def pairs(x):
    return jnp.split(x, 2, axis=-1)  # BUG: element i goes with i + HEAD / 2


def joined(first, second):
    return jnp.concatenate([first, second], axis=-1)  # BUG: the way back


def mended_pairs(x):
    return x[..., ::2], x[..., 1::2]


def mended_joined(first, second):
    return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)


class JaxAttention(eqx.Module):
    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    mended: bool = eqx.field(static=True)

    def __init__(self, mended, key):
        keys = jax.random.split(key, 4)
        self.q, self.k, self.v, self.o = (eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key) for key in keys)
        self.mended = mended

    def rotate(self, x):
        """x is (tokens, heads, head width)."""
        angles = jnp.arange(len(x))[:, None] * 10000.0 ** (-jnp.arange(0, HEAD, 2) / HEAD)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        first, second = mended_pairs(x) if self.mended else pairs(x)
        rotated = first * cos - second * sin, first * sin + second * cos
        return mended_joined(*rotated) if self.mended else joined(*rotated)

    def __call__(self, x):
        tokens = len(x)
        q, k, v = (jax.vmap(part)(x).reshape(tokens, HEADS, HEAD) for part in (self.q, self.k, self.v))
        scores = jnp.einsum("qhd,khd->hqk", self.rotate(q), self.rotate(k)) / np.sqrt(HEAD)
        scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), scores, -jnp.inf)
        mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), v)
        return jax.vmap(self.o)(mixed.reshape(tokens, WIDTH))


class JaxBlock(eqx.Module):
    norm1: eqx.nn.RMSNorm
    attention: JaxAttention
    norm2: eqx.nn.RMSNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, mended, key):
        key, up, down = jax.random.split(key, 3)
        self.norm1 = eqx.nn.RMSNorm(WIDTH, eps=1e-5, use_bias=False)
        self.attention = JaxAttention(mended, key)
        self.norm2 = eqx.nn.RMSNorm(WIDTH, eps=1e-5, use_bias=False)
        self.up = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=up)
        self.down = eqx.nn.Linear(2 * WIDTH, WIDTH, key=down)

    def __call__(self, x):
        x = x + self.attention(jax.vmap(self.norm1)(x))
        hidden = jax.nn.silu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)))
        return x + jax.vmap(self.down)(hidden)


class JaxDecoder(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, mended, key):
        key, embedding, head = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=embedding)
        self.blocks = [JaxBlock(mended, part) for part in jax.random.split(key, LAYERS)]
        self.norm = eqx.nn.RMSNorm(WIDTH, eps=1e-5, use_bias=False)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=head)

    def sequence(self, ids):
        x = jax.vmap(self.embedding)(ids)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))

    def __call__(self, ids):
        return jax.vmap(self.sequence)(ids)


def blank(shapes):
    """The model with weights of zero; `parity.compare` writes them."""
    arrays, rest = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return eqx.combine(jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), arrays), rest)


def make_reference():
    torch.manual_seed(0)
    return Decoder()


def make_candidate():
    return blank(eqx.filter_eval_shape(JaxDecoder, False, jax.random.key(0)))


def make_mended():
    return blank(eqx.filter_eval_shape(JaxDecoder, True, jax.random.key(0)))


def inputs():
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, TOKENS))
