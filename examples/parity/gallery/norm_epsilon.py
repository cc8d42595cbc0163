"""Epsilon of a norm: Flax's LayerNorm adds 1e-6 to the variance, PyTorch's 1e-5, unless told otherwise.

An autoencoder of gene counts, ported to Flax Linen; the encoder was given PyTorch's epsilon, the decoder was forgotten.
Threads: scverse/scvi-tools#3749, goodfire-ai/spd#625.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from torch import nn

GENES, WIDTH, LATENT = 24, 16, 4
HINT = r"(?i)epsilon|\beps\b"


class Layer(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x):
        return torch.relu(self.norm(self.dense(x)))


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_0 = Layer(GENES, WIDTH)
        self.encoder_1 = Layer(WIDTH, WIDTH)
        self.latent = nn.Linear(WIDTH, LATENT)
        self.decoder_0 = Layer(LATENT, WIDTH)
        self.decoder_1 = Layer(WIDTH, WIDTH)
        self.scale = nn.Linear(WIDTH, GENES)

    def forward(self, counts):
        x = torch.log1p(counts)
        z = self.latent(self.encoder_1(self.encoder_0(x)))
        h = self.decoder_1(self.decoder_0(z))
        return counts.sum(-1, keepdim=True) * torch.softmax(self.scale(h), dim=-1)


def decoder_norm(x):
    return linen.LayerNorm(name="norm")(x)  # BUG: epsilon is 1e-6


def mended_decoder_norm(x):
    return linen.LayerNorm(epsilon=1e-5, name="norm")(x)


class JaxEncoderLayer(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(WIDTH, name="dense")(x)
        return linen.relu(linen.LayerNorm(epsilon=1e-5, name="norm")(x))


class JaxDecoderLayer(linen.Module):
    mended: bool

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(WIDTH, name="dense")(x)
        norm = mended_decoder_norm if self.mended else decoder_norm
        return linen.relu(norm(x))


class JaxAutoencoder(linen.Module):
    mended: bool

    @linen.compact
    def __call__(self, counts):
        x = jnp.log1p(counts)
        for i in range(2):
            x = JaxEncoderLayer(name=f"encoder_{i}")(x)
        x = linen.Dense(LATENT, name="latent")(x)
        for i in range(2):
            x = JaxDecoderLayer(self.mended, name=f"decoder_{i}")(x)
        scale = linen.softmax(linen.Dense(GENES, name="scale")(x))
        return counts.sum(-1, keepdims=True) * scale


def blank(shapes):
    """Zeros of these shapes; `parity.compare` writes the weights."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)


def make_reference():
    torch.manual_seed(0)
    return Autoencoder()


def make_candidate(mended=False):
    module = JaxAutoencoder(mended)
    return module, blank(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, GENES))))


def make_mended():
    return make_candidate(mended=True)


def inputs():
    return np.random.default_rng(0).poisson(2.0, (4, GENES)).astype(np.float64)
