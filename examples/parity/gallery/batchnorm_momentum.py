"""Momentum of a BatchNorm: PyTorch's 0.1 is the weight of the new batch, Flax's 0.9 that of the old average.

A convolutional classifier, ported to Flax Linen with a BatchNorm of its own, because Flax's doesn't apply Bessel's
correction to the running variance as PyTorch's does. Outputs agree; the running averages part in the first step of
training. Threads: scverse/scvi-tools#2309, pytorch/vision#8250.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from torch import nn

CHANNELS, CLASSES = 6, 4
MOMENTUM = 0.1
HINT = r"(?i)momentum"
CHECK, TENSOR = "state", r"norm[12]\.(?:mean|var)"

options = {"mode": "train", "checks": ("weights", "forward", "gradients", "state")}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(CHANNELS, momentum=MOMENTUM)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(CHANNELS, momentum=MOMENTUM)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, images):
        x = torch.relu(self.norm1(self.conv1(images)))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean(dim=(2, 3)))


def moved(average, new):
    return MOMENTUM * average + (1 - MOMENTUM) * new  # BUG: PyTorch's number in Flax's formula


def mended_moved(average, new):
    return (1 - MOMENTUM) * average + MOMENTUM * new


class JaxBatchNorm(linen.Module):
    """Flax's names and PyTorch's arithmetic: a biased variance normalises, an unbiased one is remembered."""

    mended: bool
    train: bool

    @linen.compact
    def __call__(self, x):
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", linen.initializers.ones, (channels,))
        bias = self.param("bias", linen.initializers.zeros, (channels,))
        if self.train:
            update = mended_moved if self.mended else moved
            n = x.size // channels
            batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            if not self.is_initializing():
                mean.value = update(mean.value, batch_mean)
                var.value = update(var.value, batch_var * (n / (n - 1)))
        else:
            batch_mean, batch_var = mean.value, var.value
        return (x - batch_mean) / jnp.sqrt(batch_var + 1e-5) * scale + bias


class JaxClassifier(linen.Module):
    mended: bool
    train: bool

    @linen.compact
    def __call__(self, images):
        x = linen.Conv(CHANNELS, (3, 3), padding=1, name="conv1")(images)
        x = linen.relu(JaxBatchNorm(self.mended, self.train, name="norm1")(x))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        x = linen.Conv(CHANNELS, (3, 3), padding=1, name="conv2")(x)
        x = linen.relu(JaxBatchNorm(self.mended, self.train, name="norm2")(x))
        return linen.Dense(CLASSES, name="head")(x.mean((1, 2)))


def blank(shapes):
    """Zeros of these shapes; `parity.compare` writes the weights."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)


def make_reference():
    torch.manual_seed(0)
    return Classifier()


def make_candidate(mended=False):
    module = JaxClassifier(mended, train=True)
    return module, blank(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))


def make_mended():
    return make_candidate(mended=True)


def inputs():
    return np.random.default_rng(0).standard_normal((4, 3, 8, 8))


def to_candidate(images):
    return images.transpose(0, 2, 3, 1)
