"""Between the canonical form and a PyTorch state dict: same names; nn.Linear stores (out, in), GPT-2 (in, out)."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from gpt2_core.config import ModelConfig
from gpt2_core.weights import Weights
from gpt2_torch.model import GPT2

_LINEARS = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "c_gate.weight")


def to_state_dict(weights: Weights) -> dict[str, Tensor]:
    """The state dict of a `GPT2`, sharing no memory with `weights`."""
    return {name: _to_tensor(a.T if name.endswith(_LINEARS) else a) for name, a in weights.arrays.items()}


def to_canonical(state: Mapping[str, Tensor], config: ModelConfig, source: str, tokenizer: str | None) -> Weights:
    """Canonical weights from a state dict of `GPT2`; raises UserError if it isn't one of this configuration."""
    return Weights(config, canonical_arrays(state), source, tokenizer)


def canonical_arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A state dict, or anything shaped like one (gradients, moments), in canonical shapes."""
    return {name: _to_array(t.T if name.endswith(_LINEARS) else t) for name, t in state.items()}


def build(weights: Weights) -> GPT2:
    """A model in evaluation mode that holds `weights`, in their dtype."""
    model = GPT2(weights.config)
    model.to(_to_tensor(weights.arrays["wte.weight"][:0]).dtype)
    model.load_state_dict(to_state_dict(weights))
    return model.eval()


def _to_tensor(array: np.ndarray) -> Tensor:
    array = np.array(array, order="C")  # PyTorch would share the memory, which may be mapped read-only
    if array.dtype == ml_dtypes.bfloat16:  # which PyTorch can't take from numpy
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
