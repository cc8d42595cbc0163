"""The losses before a step, as part of the training's state, and the highest that the next may have.

Shape: W the number of losses (`gpt2_core.spikes.WINDOW`), oldest first.
"""

import jax
import jax.numpy as jnp

from gpt2_core.spikes import LEAST, NO_LOSS, SMALLEST_DEVIATION


def loss_limit(losses_W: jax.Array, deviations: float) -> jax.Array:
    """The loss beyond which a step's is a spike: so many standard deviations above the mean; infinite while there are
    too few losses."""
    known_W = losses_W != NO_LOSS
    count = known_W.sum()
    mean = jnp.mean(losses_W, where=known_W)
    deviation = jnp.maximum(jnp.std(losses_W, where=known_W), SMALLEST_DEVIATION)
    return jnp.where(count >= LEAST, mean + deviations * deviation, jnp.inf)


def with_loss(losses_W: jax.Array, loss: jax.Array) -> jax.Array:
    """The window after one more step; a loss that isn't finite leaves it as it is."""
    return jnp.where(jnp.isfinite(loss), jnp.append(losses_W[1:], loss.astype(losses_W.dtype)), losses_W)
