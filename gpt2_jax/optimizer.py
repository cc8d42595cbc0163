"""AdamW as PyTorch computes it, with optax: clipping, moments, decoupled decay; not the learning rate."""

import functools

import jax
import jax.numpy as jnp
import optax

from gpt2_core.config import ModelConfig, OptimizerConfig
from gpt2_jax.definition import Params


def make_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformationExtraArgs:
    """Turns gradients into the step that, times minus the learning rate, updates the parameters.

    Decay touches only parameters of two or more dimensions in their canonical shape (not biases and layer norms),
    and is added after the moments: decoupled (Loshchilov & Hutter 2019).
    """
    decayed = {name: len(shape) >= 2 for name, shape in model.parameter_shapes.items()}
    return optax.chain(_scale_by_adam(config), optax.add_decayed_weights(config.weight_decay, mask=decayed))


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam with a further argument `is_update`: where it is false, count and moments stay as they are.

    The update is computed from the moments that are returned, and not from others that a later selection would leave
    out: XLA can then write the new moments over the old.
    """

    def update(grads, state, params=None, *, is_update: jax.Array | bool = True):
        def kept(new, old):
            return jax.tree.map(functools.partial(jnp.where, is_update), new, old)

        count = kept(optax.safe_increment(state.count), state.count)
        mu = kept(optax.tree.update_moment(grads, state.mu, config.beta1, 1), state.mu)
        nu = kept(optax.tree.update_moment_per_elem_norm(grads, state.nu, config.beta2, 2), state.nu)
        mu_hat = optax.tree.bias_correction(mu, config.beta1, count)
        nu_hat = optax.tree.bias_correction(nu, config.beta2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.epsilon), mu_hat, nu_hat)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    init = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon).init
    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_global_norm(grads: Params, clip_norm: float) -> tuple[Params, jax.Array]:
    """Gradients scaled to a global norm of at most `clip_norm` (0: left alone), and their norm before that.

    PyTorch's formula (torch.nn.utils.clip_grad_norm_): the norm gets 1e-6 added before it divides. optax's has no such
    term, and float64 loss curves part at 1e-8 within five steps.
    """
    norm = optax.tree.norm(grads)
    if clip_norm == 0:
        return grads, norm
    scale = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, grads), norm
