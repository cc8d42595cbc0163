"""GPT-NeoX of `transformers` and its port to Flax NNX, the example of docs/porting-guide.md.

    python -m parity compare port:make_reference port:make_port --inputs port:inputs

in this folder.

Shape suffixes: B batch, T and S positions, E width, H heads, D width of a head, F rotary frequencies, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

CONFIG = GPTNeoXConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    use_cache=False,
)


def rotate(x_BTHD, width, theta):
    """Rotary positions in the first `width` numbers of each head."""
    frequencies_F = theta ** (-jnp.arange(0, width, 2) / width)
    angles_TF = jnp.arange(x_BTHD.shape[1])[:, None] * frequencies_F
    cos, sin = jnp.cos(angles_TF)[:, None], jnp.sin(angles_TF)[:, None]
    turned, rest = x_BTHD[..., :width], x_BTHD[..., width:]
    first, second = jnp.split(turned, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class Attention(nnx.Module):
    def __init__(self, config, rngs):
        self.heads, self.rope = config.num_attention_heads, config.rope_parameters
        self.qkv = nnx.Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.out = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    def __call__(self, x_BTE):
        B, T, E = x_BTE.shape
        D = E // self.heads
        q, k, v = jnp.split(self.qkv(x_BTE).reshape(B, T, self.heads, 3 * D), 3, axis=-1)
        width = int(D * self.rope["partial_rotary_factor"])
        q, k = (rotate(x, width, self.rope["rope_theta"]) for x in (q, k))
        scores_BHTS = jnp.einsum("bthd,bshd->bhts", q, k) / D**0.5
        scores_BHTS = jnp.where(jnp.tri(T, dtype=bool), scores_BHTS, -jnp.inf)
        weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
        return self.out(jnp.einsum("bhts,bshd->bthd", weights_BHTS, v).reshape(B, T, E))


class MLP(nnx.Module):
    def __init__(self, config, rngs):
        self.up = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.down = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x_BTE):
        return self.down(jax.nn.gelu(self.up(x_BTE), approximate=False))


def norm(config, rngs):
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, config, rngs):
        self.norm1, self.attention = norm(config, rngs), Attention(config, rngs)
        self.norm2, self.mlp = norm(config, rngs), MLP(config, rngs)

    def __call__(self, x_BTE):
        attended_BTE = self.attention(self.norm1(x_BTE))
        return self.mlp(self.norm2(x_BTE)) + attended_BTE + x_BTE


class GPTNeoX(nnx.Module):
    def __init__(self, config, rngs):
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = norm(config, rngs)
        self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens_BT):
        x_BTE = self.embed(tokens_BT)
        for layer in self.layers:
            x_BTE = layer(x_BTE)
        return self.head(self.norm(x_BTE))


def make_reference():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(CONFIG)


def make_port():
    return GPTNeoX(CONFIG, nnx.Rngs(0))


def inputs():
    """Token ids (2, 12)."""
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12))


def torch_loss(outputs, tokens_BT):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def jax_loss(logits_BTV, tokens_BT):
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], tokens_BT[:, 1:]).mean()


TRAINING = {
    "loss": (torch_loss, jax_loss),
    "optimizer": (lambda p: torch.optim.AdamW(p, lr=1e-3), optax.adamw(1e-3, weight_decay=1e-2)),
}
