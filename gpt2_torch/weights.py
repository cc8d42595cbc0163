"""Conversion between canonical weights and a PyTorch state dict: the names are the same, and the layout `torch` of
gpt2_core.weights.layouts lists the shapes that differ (nn.Linear stores (out, in), GPT-2 (in, out))."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from gpt2_core.config import ModelConfig
from gpt2_core.weights import Weights
from gpt2_core.weights.layouts import TORCH
from gpt2_torch.model import GPT2


def to_state_dict(weights: Weights) -> dict[str, Tensor]:
    """The state dict of a `GPT2`, sharing no memory with `weights`."""
    return {name: to_tensor(t.read()) for name, t in TORCH.encode(weights.tensors, weights.config).items()}


def to_canonical(state: Mapping[str, Tensor], config: ModelConfig, source: str, tokenizer: str | None) -> Weights:
    """Canonical weights from a state dict of `GPT2`; raises UserError if it isn't one of this configuration."""
    return Weights(config, canonical_arrays(state, config), source, tokenizer)


def canonical_arrays(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """A state dict, or anything shaped like one (gradients, moments), in canonical shapes."""
    return {
        name: placement.decode(to_array(state[placement.name])) for name, placement in TORCH.placements(config).items()
    }


def build(weights: Weights) -> GPT2:
    """A model in evaluation mode that holds `weights`, in their widest dtype."""
    model = GPT2(weights.config)
    state = to_state_dict(weights)
    model.to(max((t.dtype for t in state.values()), key=lambda dtype: dtype.itemsize))
    model.load_state_dict(state)
    return model.eval()


def to_tensor(array: np.ndarray) -> Tensor:
    array = np.array(array, order="C")  # PyTorch would share the memory, which may be mapped read-only
    if array.dtype == ml_dtypes.bfloat16:  # which PyTorch can't take from numpy
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
