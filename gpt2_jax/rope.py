"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864).

Shapes: B batch, H heads, T time, K head size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_core.config import ModelConfig


def rotate(x_BHTK: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Queries or keys with pair i of position t rotated by t theta^(-2i/K); `positions` are (T,) or (B, T).

    `rope_pairs` says which features make a pair: `half`, i and i + K/2; `interleaved`, 2i and 2i + 1.
    """
    K = x_BHTK.shape[-1]
    # Angles are made on the host in float64: at position 1,000 float32 would have lost the fourth digit of a radian.
    frequencies = config.rope_theta ** (-np.arange(0, K, 2) / K)
    angles = np.arange(config.block_size)[:, None] * frequencies
    dtype = jnp.promote_types(x_BHTK.dtype, jnp.float32)
    cos, sin = (jnp.asarray(table, dtype)[positions] for table in (np.cos(angles), np.sin(angles)))
    if positions.ndim == 2:
        cos, sin = cos[:, None], sin[:, None]
    x = x_BHTK.astype(dtype)
    if config.rope_pairs == "half":
        a, b = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return rotated.astype(x_BHTK.dtype)
