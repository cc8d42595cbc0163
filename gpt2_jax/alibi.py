"""ALiBi, attention with linear biases (Press, Smith & Lewis 2022, "Train Short, Test Long",
https://arxiv.org/abs/2108.12409).

Shapes: B batch, H heads, T queries, S keys.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

Slopes = tuple[float, ...]
"""One for each head."""


def alibi_slopes(n_head: int) -> Slopes:
    """The slope of each head: 2^(-8/n), 2^(-16/n), ... 2^-8, n being the number of heads, if that is a power of two
    (section 3 of the paper).

    The paper trains no other numbers of heads; its released code (`get_slopes` in fairseq/models/transformer.py of
    github.com/ofirpress/attention_with_linear_biases) takes the slopes of the power of two below, then every other one
    of those of twice that power, from its first.
    """
    power = 2 ** math.floor(math.log2(n_head))
    exponents = np.concatenate([np.arange(1, power + 1), np.arange(1, 2 * (n_head - power), 2) / 2]) * 8 / power
    return tuple((2.0**-exponents).tolist())


def alibi_bias(slopes: Slopes, queries: jax.Array, keys: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What is added to the scaled scores: -slope (query's position - key's position), shape (H, T, S), or (B, H, T, S).

    `queries` are the positions (T,), or (B, T) where sequences have their own; `keys` are those of the keys, (S,).
    """
    distance = (queries[..., :, None] - keys).astype(dtype)
    return -jnp.asarray(slopes, dtype)[:, None, None] * distance[..., None, :, :]
