"""Sliding window off by one: the port lets a token see itself and `window` others, the reference `window` in all.

A small decoder with local attention, ported to Haiku. Threads: huggingface/transformers#29176 (PyTorch's and Flax's
Mistral), huggingface/transformers#26792.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

VOCABULARY, WIDTH, HEADS, WINDOW, TOKENS, LAYERS = 17, 16, 2, 3, 8, 2
HEAD = WIDTH // HEADS
HINT = r"(?i)mask"


class LocalAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        batch, tokens, _ = x.shape
        parts = (part(x).reshape(batch, tokens, HEADS, HEAD) for part in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) / HEAD**0.5
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        scores = scores.masked_fill((distance < 0) | (distance >= WINDOW), -1e30)
        mixed = torch.softmax(scores, dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.RMSNorm(WIDTH, eps=1e-5)
        self.attention = LocalAttention()
        self.norm2 = nn.RMSNorm(WIDTH, eps=1e-5)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block_0 = Block()
        self.block_1 = Block()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.block_1(self.block_0(self.embedding(ids)))
        return self.head(self.norm(x))


def masked(scores, distance):
    return jnp.where((distance >= 0) & (distance <= WINDOW), scores, -1e30)  # BUG: one token too many


def mended_masked(scores, distance):
    return jnp.where((distance >= 0) & (distance < WINDOW), scores, -1e30)


class JaxLocalAttention(hk.Module):
    def __init__(self, mask, name="attention"):
        super().__init__(name=name)
        self.mask = mask

    def __call__(self, x):
        batch, tokens, _ = x.shape
        names = ("query", "key", "value")
        q, k, v = (hk.Linear(WIDTH, name=name)(x).reshape(batch, tokens, HEADS, HEAD) for name in names)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(HEAD)
        distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        weights = jax.nn.softmax(self.mask(scores, distance), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return hk.Linear(WIDTH, name="out")(mixed.reshape(batch, tokens, WIDTH))


class JaxBlock(hk.Module):
    def __init__(self, mask, name):
        super().__init__(name=name)
        self.mask = mask

    def __call__(self, x):
        x = x + JaxLocalAttention(self.mask)(hk.RMSNorm(-1, eps=1e-5, name="norm1")(x))
        h = hk.RMSNorm(-1, eps=1e-5, name="norm2")(x)
        h = jax.nn.relu(hk.Linear(2 * WIDTH, name="fc1")(h))
        return x + hk.Linear(WIDTH, name="fc2")(h)


def network(ids, mask):
    x = hk.Embed(VOCABULARY, WIDTH, name="embedding")(ids)
    for i in range(LAYERS):
        x = JaxBlock(mask, name=f"block_{i}")(x)
    return hk.Linear(VOCABULARY, name="head")(hk.RMSNorm(-1, eps=1e-5, name="norm")(x))


def blank(shapes):
    """Zeros of these shapes; `parity.compare` writes the weights."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)


def make_reference():
    torch.manual_seed(0)
    return Decoder()


def make_candidate(mask=masked):
    transformed = hk.transform(lambda ids: network(ids, mask))
    return transformed, blank(jax.eval_shape(transformed.init, jax.random.key(0), jnp.zeros((1, TOKENS), int)))


def make_mended():
    return make_candidate(mended_masked)


def inputs():
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, TOKENS))
