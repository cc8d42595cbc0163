"""A converter that drops weights without a word: it copies the names it knows, and LoRA's are not among them.

A fine-tuned text classifier, converted to plain JAX functions, which would apply LoRA if they were given it. The code
that computes is right, so a tensor is what has to be named. Thread: Physical-Intelligence/openpi#958.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

VOCABULARY, WIDTH, HEADS, RANK, CLASSES, LAYERS = 17, 16, 2, 3, 4, 2
HEAD, SCALING = WIDTH // HEADS, 2.0
HINT = r"(?i)lora_[ab]"
CHECK, TENSOR = "weights", r"lora_[ab]"


class LoraLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.lora_a = nn.Parameter(torch.randn(RANK, WIDTH) / 4)
        self.lora_b = nn.Parameter(torch.randn(WIDTH, RANK))

    def forward(self, x):
        return x @ self.weight.T + self.bias + SCALING * (x @ self.lora_a.T @ self.lora_b.T)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = LoraLinear(), nn.Linear(WIDTH, WIDTH), LoraLinear()
        self.o = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        batch, tokens, _ = x.shape
        h = self.norm1(x)
        q, k, v = (part(h).reshape(batch, tokens, HEADS, HEAD).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


class TextClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def linear(p, x):
    y = x @ p["weight"].T + p["bias"]
    if "lora_a" in p:
        y = y + SCALING * (x @ p["lora_a"].T @ p["lora_b"].T)
    return y


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-5) * p["weight"] + p["bias"]


def attention(p, x):
    batch, tokens, _ = x.shape
    q, k, v = (linear(p[name], x).reshape(batch, tokens, HEADS, HEAD) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(HEAD)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
    return linear(p["o"], mixed.reshape(batch, tokens, WIDTH))


def classifier(params, ids):
    x = params["embedding"]["weight"][ids]
    for i in range(LAYERS):
        p = params["blocks"][str(i)]
        x = x + attention(p, layer_norm(p["norm1"], x))
        x = x + linear(p["fc2"], jax.nn.relu(linear(p["fc1"], layer_norm(p["norm2"], x))))
    return linear(params["head"], layer_norm(params["norm"], x).mean(axis=1))


def known(leaf):
    return leaf in ("weight", "bias")  # BUG: lora_a and lora_b are left behind


def mended_known(leaf):
    return leaf in ("weight", "bias", "lora_a", "lora_b")


def convert(state, known):
    """PyTorch's `blocks.0.q.weight` becomes `params["blocks"]["0"]["q"]["weight"]`."""
    params = {}
    for name, tensor in state.items():
        *modules, leaf = name.split(".")
        if known(leaf):
            place = params
            for module in modules:
                place = place.setdefault(module, {})
            place[leaf] = jnp.asarray(tensor.numpy())
    return params


def make_reference():
    torch.manual_seed(0)
    return TextClassifier()


def make_candidate():
    return classifier, convert(make_reference().state_dict(), known)


def make_mended():
    return classifier, convert(make_reference().state_dict(), mended_known)


def inputs():
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, 6))
