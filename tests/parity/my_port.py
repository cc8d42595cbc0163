"""An implementation of a user's own, for the test of --against: a port that is right, and one that isn't.

docs/parity.md shows the same as an example.
"""

import jax
import jax.numpy as jnp
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


def make_model() -> torch.nn.Module:
    return build(read_weights("w.safetensors"))


def _layer_norm(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * weight + bias


def jax_model_with_another_epsilon():
    """(function of parameters and token ids, parameters); the first norm's epsilon is wrong."""
    weights = read_weights("w.safetensors")

    def compute(p, tokens):
        x = p["wte.weight"][tokens] + p["wpe.weight"][: tokens.shape[1]]
        h = _layer_norm(x, p["h.0.ln_1.weight"], p["h.0.ln_1.bias"], 1e-3)
        qkv = jnp.split(h @ p["h.0.attn.c_attn.weight"] + p["h.0.attn.c_attn.bias"], 3, axis=-1)
        q, k, v = (t.reshape(*t.shape[:2], weights.config.n_head, -1) for t in qkv)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = x + out @ p["h.0.attn.c_proj.weight"] + p["h.0.attn.c_proj.bias"]
        h = _layer_norm(x, p["h.0.ln_2.weight"], p["h.0.ln_2.bias"], 1e-5)
        h = jax.nn.gelu(h @ p["h.0.mlp.c_fc.weight"] + p["h.0.mlp.c_fc.bias"])
        x = x + h @ p["h.0.mlp.c_proj.weight"] + p["h.0.mlp.c_proj.bias"]
        return _layer_norm(x, p["ln_f.weight"], p["ln_f.bias"], 1e-5) @ p["wte.weight"].T

    return compute, {name: jnp.asarray(array) for name, array in weights.arrays.items()}
