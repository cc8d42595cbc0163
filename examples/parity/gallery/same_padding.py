"""SAME padding with a stride: it pads 0 before and 1 after where PyTorch's `padding=1` pads 1 on both sides.

The shapes agree and so do all convolutions of stride 1. A small residual network, ported to Haiku, whose convolutions
pad SAME unless told otherwise. Threads: google/flax#2993, google/flax#963.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

CHANNELS, CLASSES = 6, 4
HINT = r"(?i)padding"


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class ResidualNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.stage1 = Residual(CHANNELS)
        self.down = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, padding=1)
        self.stage2 = Residual(2 * CHANNELS)
        self.head = nn.Linear(2 * CHANNELS, CLASSES)

    def forward(self, images):
        x = self.stage1(torch.relu(self.stem(images)))
        x = self.stage2(torch.relu(self.down(x)))
        return self.head(x.mean(dim=(2, 3)))


class JaxResidual(hk.Module):
    def __call__(self, x):
        channels = x.shape[-1]
        h = jax.nn.relu(hk.Conv2D(channels, 3, name="conv1")(x))
        return jax.nn.relu(x + hk.Conv2D(channels, 3, name="conv2")(h))


def down(x):
    return hk.Conv2D(2 * CHANNELS, 3, stride=2, name="down")(x)  # BUG: pads SAME


def mended_down(x):
    return hk.Conv2D(2 * CHANNELS, 3, stride=2, padding=(1, 1), name="down")(x)


def network(images, downsample):
    x = jax.nn.relu(hk.Conv2D(CHANNELS, 3, name="stem")(images))
    x = JaxResidual(name="stage1")(x)
    x = jax.nn.relu(downsample(x))
    x = JaxResidual(name="stage2")(x)
    return hk.Linear(CLASSES, name="head")(x.mean(axis=(1, 2)))


def blank(shapes):
    """Zeros of these shapes; `parity.compare` writes the weights."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)


def make_reference():
    torch.manual_seed(0)
    return ResidualNetwork()


def make_candidate(downsample=down):
    transformed = hk.without_apply_rng(hk.transform(lambda images: network(images, downsample)))
    return transformed, blank(jax.eval_shape(transformed.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))


def make_mended():
    return make_candidate(mended_down)


def inputs():
    return np.random.default_rng(0).standard_normal((2, 3, 8, 8))


def to_candidate(images):
    return images.transpose(0, 2, 3, 1)
