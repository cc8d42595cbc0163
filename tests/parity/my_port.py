"""An implementation of a user's own, for the test of --against: a port that is right, and one that isn't.

docs/parity.md shows the same as an example.
"""

import numpy as np
import torch

from gpt2_convert import read_weights
from gpt2_torch.weights import build

_model = build(read_weights("w.safetensors"))


@torch.no_grad()
def logits(tokens: np.ndarray) -> torch.Tensor:
    """Token ids (B, T) to logits (B, T, V)."""
    return _model(torch.from_numpy(tokens))


def without_positions(tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([logits(tokens[:, t : t + 1]) for t in range(tokens.shape[1])], dim=1)


def in_float64_with_erf(tokens: np.ndarray) -> np.ndarray:
    model = build(read_weights("w.safetensors").astype(np.float64))
    gelu = torch.nn.functional.gelu
    torch.nn.functional.gelu = lambda x, approximate: gelu(x)
    try:
        with torch.no_grad():
            return model(torch.from_numpy(tokens)).numpy()
    finally:
        torch.nn.functional.gelu = gelu
