"""GELU in its tanh form: `nnx.gelu` and `jax.nn.gelu` approximate unless told not to; `torch.nn.GELU` computes erf.

A small Vision Transformer, ported to Flax NNX. Threads: goodfire-ai/spd#624, google/gemma_pytorch#33.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

WIDTH, HEADS, CLASSES, PATCH, LAYERS = 16, 2, 5, 4, 2
HINT = r"GELU"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images):
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def activation(x):
    return nnx.gelu(x)  # BUG: the tanh form


def mended_activation(x):
    return nnx.gelu(x, approximate=False)


class JaxAttention(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        batch, tokens, _ = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(batch, tokens, 3, HEADS, -1), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // HEADS)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nnx.softmax(scores, axis=-1), v)
        return self.proj(mixed.reshape(batch, tokens, WIDTH))


class JaxBlock(nnx.Module):
    def __init__(self, act, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = JaxAttention(rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.fc1 = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.act = act
        self.fc2 = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class JaxVisionTransformer(nnx.Module):
    def __init__(self, act, rngs):
        self.patch = nnx.Conv(3, WIDTH, (PATCH, PATCH), strides=PATCH, padding="VALID", rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.positions = nnx.Param(jnp.zeros((1, 5, WIDTH)))
        self.blocks = nnx.List([JaxBlock(act, rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images):
        patches = self.patch(images).reshape(len(images), -1, WIDTH)
        cls = jnp.broadcast_to(self.cls_token[...], (len(images), 1, WIDTH))
        x = jnp.concatenate([cls, patches], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def blank(make):
    """The model with weights of zero; `parity.compare` writes them."""
    graph, shapes = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes))


def make_reference():
    torch.manual_seed(0)
    return VisionTransformer()


def make_candidate():
    return blank(lambda: JaxVisionTransformer(activation, nnx.Rngs(0)))


def make_mended():
    return blank(lambda: JaxVisionTransformer(mended_activation, nnx.Rngs(0)))


def inputs():
    return np.random.default_rng(0).standard_normal((2, 3, 8, 8))


def to_candidate(images):
    return images.transpose(0, 2, 3, 1)
