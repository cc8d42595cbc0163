"""Order of features after flattening: PyTorch flattens channels first, Flax channels last; the next layer's rows move.

A convolutional Q-network, ported to Flax NNX. Threads: microsoft/MMdnn#595; "Convolutions and FC Layers" in
https://flax.readthedocs.io/en/stable/migrating/convert_pytorch_to_flax.html
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

CHANNELS, HIDDEN, ACTIONS = 8, 16, 5
HINT = r"(?i)flatten|channel|NCHW|NHWC|order of"


class QNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 4, stride=2)
        self.conv2 = nn.Conv2d(6, CHANNELS, 3)
        self.fc1 = nn.Linear(CHANNELS * 3 * 2, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.value = nn.Linear(HIDDEN, ACTIONS)

    def forward(self, frames):
        x = torch.relu(self.conv1(frames))
        x = torch.relu(self.conv2(x))
        x = torch.flatten(x, 1)
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.value(x)


def flatten(x):
    return x.reshape(x.shape[0], -1)  # BUG: height, width, channel


def mended_flatten(x):
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


class JaxQNetwork(nnx.Module):
    def __init__(self, flatten, rngs):
        self.conv1 = nnx.Conv(3, 6, (4, 4), strides=2, padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, CHANNELS, (3, 3), padding="VALID", rngs=rngs)
        self.flatten = flatten
        self.fc1 = nnx.Linear(CHANNELS * 3 * 2, HIDDEN, rngs=rngs)
        self.fc2 = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.value = nnx.Linear(HIDDEN, ACTIONS, rngs=rngs)

    def __call__(self, frames):
        x = nnx.relu(self.conv1(frames))
        x = nnx.relu(self.conv2(x))
        x = self.flatten(x)
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.value(x)


def blank(make):
    """The model with weights of zero; `parity.compare` writes them."""
    graph, shapes = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes))


def make_reference():
    torch.manual_seed(0)
    return QNetwork()


def make_candidate():
    return blank(lambda: JaxQNetwork(flatten, nnx.Rngs(0)))


def make_mended():
    return blank(lambda: JaxQNetwork(mended_flatten, nnx.Rngs(0)))


def inputs():
    return np.random.default_rng(0).standard_normal((2, 3, 12, 10))


def to_candidate(frames):
    return frames.transpose(0, 2, 3, 1)
