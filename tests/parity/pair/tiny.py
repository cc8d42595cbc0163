"""A small decoder in both frameworks, written as two people would: what the tests compare."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

WIDTH, HEADS, DEPTH, VOCABULARY, LENGTH = 12, 3, 2, 17, 7
TOKENS = np.random.RandomState(0).randint(0, VOCABULARY, (2, LENGTH))


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.ln_1(x)
        q, k, v = (
            p(h).view(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(self.ln_2(x))))


class TorchDecoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.pos = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.layers = torch.nn.ModuleList(TorchBlock() for _ in range(DEPTH))
        self.norm, self.lm_head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens) + self.pos(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Block(nnx.Module):
    def __init__(self, rngs, epsilon=1e-5, approximate=False):
        self.approximate = approximate
        self.ln1 = nnx.LayerNorm(WIDTH, epsilon=epsilon, rngs=rngs)
        self.ln2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.query, self.key, self.value, self.out = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        h = self.ln1(x)
        q, k, v = (p(h).reshape(*x.shape[:2], HEADS, -1) for p in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + self.out(attended.reshape(x.shape))
        h = self.up(self.ln2(x))
        return x + self.down(jax.nn.gelu(h, approximate=self.approximate))


class Decoder(nnx.Module):
    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        self.wte = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.wpe = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, **options) for _ in range(DEPTH)])
        self.ln_f, self.head = (
            nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs),
            nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs),
        )

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def make_torch():
    return TorchDecoder()


def make_jax():
    return Decoder()


def make_wrong():
    return Decoder(approximate=True)
