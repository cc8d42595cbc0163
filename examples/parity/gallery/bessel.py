"""Bessel's correction: `torch.std` divides by n - 1 unless told not to, `jnp.std` by n.

A speaker embedding network with statistics pooling, ported to JAX functions that keep PyTorch's layout of weights.
Threads: pytorch/pytorch#50010, NVIDIA-NeMo/Speech#7225.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

BANDS, CHANNELS, EMBEDDING, SPEAKERS = 8, 12, 10, 6
HINT = r"(?i)bessel|unbiased|ddof|n ?[-−] ?1"


class StatisticsPooling(nn.Module):
    def forward(self, x):
        return torch.cat([x.mean(dim=-1), x.std(dim=-1)], dim=-1)


class SpeakerNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.frame1 = nn.Conv1d(BANDS, CHANNELS, 5, padding=2)
        self.frame2 = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=2, dilation=2)
        self.frame3 = nn.Conv1d(CHANNELS, CHANNELS, 1)
        self.pooling = StatisticsPooling()
        self.embedding = nn.Linear(2 * CHANNELS, EMBEDDING)
        self.norm = nn.LayerNorm(EMBEDDING)
        self.output = nn.Linear(EMBEDDING, SPEAKERS)

    def forward(self, spectrum):
        x = torch.relu(self.frame1(spectrum))
        x = torch.relu(self.frame2(x))
        x = nn.functional.leaky_relu(self.frame3(x), 0.1)
        x = self.embedding(self.pooling(x))
        return self.output(torch.relu(self.norm(x)))


def conv(p, x, padding=0, dilation=1):
    layout = ("NCH", "OIH", "NCH")
    y = jax.lax.conv_general_dilated(x, p["weight"], (1,), [(padding, padding)], None, (dilation,), layout)
    return y + p["bias"][:, None]


def linear(p, x):
    return x @ p["weight"].T + p["bias"]


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-5) * p["weight"] + p["bias"]


def deviation(x):
    return jnp.std(x, axis=-1)  # BUG: divides by n


def mended_deviation(x):
    return jnp.std(x, axis=-1, ddof=1)


def network(params, spectrum, std):
    x = jax.nn.relu(conv(params["frame1"], spectrum, padding=2))
    x = jax.nn.relu(conv(params["frame2"], x, padding=2, dilation=2))
    x = jax.nn.leaky_relu(conv(params["frame3"], x), 0.1)
    pooled = jnp.concatenate([x.mean(axis=-1), std(x)], axis=-1)
    x = linear(params["embedding"], pooled)
    return linear(params["output"], jax.nn.relu(layer_norm(params["norm"], x)))


def candidate(params, spectrum):
    return network(params, spectrum, deviation)


def mended(params, spectrum):
    return network(params, spectrum, mended_deviation)


def convert(state):
    """PyTorch's `frame1.weight` becomes `params["frame1"]["weight"]`."""
    params = {}
    for name, tensor in state.items():
        module, leaf = name.rsplit(".", 1)
        params.setdefault(module, {})[leaf] = jnp.asarray(tensor.numpy())
    return params


def make_reference():
    torch.manual_seed(0)
    return SpeakerNetwork()


def make_candidate():
    return candidate, convert(make_reference().state_dict())


def make_mended():
    return mended, convert(make_reference().state_dict())


def inputs():
    return np.random.default_rng(0).standard_normal((3, BANDS, 15))
