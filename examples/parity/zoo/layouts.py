"""How tensors are laid out: PyTorch's to Flax's. Equinox keeps PyTorch's layouts."""

import numpy as np


def kernel(weight: np.ndarray) -> np.ndarray:
    """Of a linear layer or a convolution: (out, in, *window) to (*window, in, out)."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def flipped_kernel(weight: np.ndarray) -> np.ndarray:
    """Of a transposed convolution: (in, out, *window) to (*window, in, out), the window turned round."""
    window = tuple(range(2, weight.ndim))
    return np.moveaxis(np.flip(weight, window), (0, 1), (-2, -1))


def channels_last(x: np.ndarray) -> np.ndarray:
    """(batch, channels, *space) to (batch, *space, channels)."""
    return np.moveaxis(x, 1, -1)


def channels_first(x: np.ndarray) -> np.ndarray:
    """(batch, *space, channels) to (batch, channels, *space)."""
    return np.moveaxis(np.asarray(x), -1, 1)
