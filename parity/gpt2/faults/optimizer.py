"""Mistakes of AdamW, its decay and clipping."""

import math
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import gpt2_jax.optimizer
import gpt2_jax.train_step
from parity.gpt2.faults.fault import fault


def _decay_where(mask: Callable[[str, tuple[int, ...]], bool]):
    def make(config, model):
        return optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
            optax.add_decayed_weights(
                config.weight_decay, mask={n: mask(n, s) for n, s in model.parameter_shapes.items()}
            ),
        )

    return make


def _adam(**changes):
    def make(config, model):
        options = {"b1": config.beta1, "b2": config.beta2, "eps": config.epsilon}
        options |= {name: change(config) for name, change in changes.items()}
        mask = {n: len(s) >= 2 for n, s in model.parameter_shapes.items()}
        return optax.chain(optax.scale_by_adam(**options), optax.add_decayed_weights(config.weight_decay, mask=mask))

    return make


def _clip_updates(config, model):
    right = gpt2_jax.optimizer.make_optimizer(config, model)
    clip = optax.clip_by_global_norm(config.clip_norm or math.inf)

    def update(grads, state, params):
        updates, state = right.update(grads, state, params)
        return clip.update(updates, None)[0], state

    return optax.GradientTransformation(right.init, update)


@fault(
    "decay on biases and norms",
    check="optimizer",
    place="JAX: decay",
    part="decay",
    seam=(gpt2_jax.train_step, "make_optimizer"),
)
def decay_on_biases_and_norms(right):
    """optax.adamw without a mask"""

    return _decay_where(lambda name, shape: True)


@fault(
    "no decay on embeddings",
    check="optimizer",
    place="JAX: decay",
    part="decay",
    seam=(gpt2_jax.train_step, "make_optimizer"),
)
def no_decay_on_embeddings(right):
    """minGPT's list of what is spared, where nanoGPT goes by dimensions"""

    return _decay_where(lambda name, shape: len(shape) >= 2 and name not in ("wte.weight", "wpe.weight"))


@fault(
    "L2 instead of decoupled decay",
    check="optimizer",
    place="AdamW, ",
    seam=(gpt2_jax.train_step, "make_optimizer"),
)
def l2_in_the_place_of_decoupled_decay(right):
    """decay chained before Adam: Adam rescales it"""

    def make(config, model):
        mask = {n: len(s) >= 2 for n, s in model.parameter_shapes.items()}
        adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
        decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
        joined = optax.chain(decay, adam)

        def update(grads, state, params):
            updates, (first, second) = joined.update(grads, state[::-1], params)
            return updates, (second, first)

        return optax.GradientTransformation(lambda params: joined.init(params)[::-1], update)

    return make


@fault(
    "no bias correction",
    check="optimizer",
    place="parameter",
    seam=(gpt2_jax.train_step, "make_optimizer"),
)
def no_bias_correction(right):
    """BERT's Adam"""

    def make(config, model):
        adamw, shapes = right(config, model), model.parameter_shapes

        def update(grads, state, params):
            _, state = adamw.update(grads, state, params)
            adam = state[0]
            plain = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.epsilon), adam.mu, adam.nu)
            decay = {n: config.weight_decay * params[n] if len(s) >= 2 else 0.0 for n, s in shapes.items()}
            return {n: plain[n] + decay[n] for n in plain}, state

        return optax.GradientTransformation(adamw.init, update)

    return make


@fault(
    "epsilon inside the root",
    check="optimizer",
    place="parameter",
    seam=(gpt2_jax.train_step, "make_optimizer"),
)
def epsilon_inside_the_root(right):
    """eps_root instead of eps"""

    return _adam(eps=lambda c: 0.0, eps_root=lambda c: c.epsilon)


@fault(
    "betas swapped",
    check="optimizer",
    place="moment",
    seam=(gpt2_jax.train_step, "make_optimizer"),
)
def betas_swapped(right):
    """b1 and b2 given in the wrong order"""

    return _adam(b1=lambda c: c.beta2, b2=lambda c: c.beta1)


@fault(
    "clipping after the optimizer",
    check="optimizer",
    place="clipping active",
)
def clipping_after_the_optimizer():
    """optax.chain(adamw, clip): the update is clipped, the moments see everything"""

    with (
        mock.patch.object(gpt2_jax.train_step, "clip_by_global_norm", lambda g, c: (g, optax.tree.norm(g))),
        mock.patch.object(gpt2_jax.train_step, "make_optimizer", _clip_updates),
    ):
        yield


@fault(
    "clipping per tensor",
    check="optimizer",
    place="clipping active",
    seam=(gpt2_jax.train_step, "clip_by_global_norm"),
)
def clipping_per_tensor(clip):
    """each gradient scaled to the norm by itself (optax.clip_by_block_rms and its kin)"""

    def wrong(grads, clip_norm):
        _, norm = clip(grads, clip_norm)
        return {n: clip({n: g}, clip_norm)[0][n] for n, g in grads.items()}, norm

    return wrong


@fault(
    "clipping without PyTorch's 1e-6",
    check="loss_curve",
    place="AdamW steps",
    seam=(gpt2_jax.train_step, "clip_by_global_norm"),
)
def clipping_without_pytorch_1e_6(clip):
    """optax.clip_by_global_norm: the curves part at 1e-8"""

    def wrong(grads, clip_norm):
        return optax.clip_by_global_norm(clip_norm).update(grads, None)[0], optax.tree.norm(grads)

    return wrong


@fault(
    "beta2 written into the code",
    check="settings",
    place="layer norm, warmup, clipping",
    seam=(gpt2_jax.train_step, "make_optimizer"),
)
def beta2_written_into_the_code(right):
    """optax's own b2, or the recipe's, instead of the configuration's"""

    return _adam(b2=lambda c: 0.95)


@fault(
    "clipping to a norm of zero",
    check="settings",
    place="no warmup, no clipping",
    part="rotary, RMS norm, no warmup, no clipping",
    seam=(gpt2_jax.train_step, "clip_by_global_norm"),
)
def clipping_to_a_norm_of_zero(clip):
    """0 means no clipping, and the formula is applied all the same: nothing is learned"""

    def wrong(grads, clip_norm):
        norm = optax.tree.norm(grads)
        return jax.tree.map(lambda g: g * jnp.minimum(1.0, clip_norm / (norm + 1e-6)), grads), norm

    return wrong


@fault(
    "the count of updates goes on where one is left out",
    check="optimizer",
    place="JAX: an update that isn't finite",
    part="an update left out",
    seam=(gpt2_jax.optimizer, "_scale_by_adam"),
)
def count_goes_on(make):
    """the moments are kept and the step is counted: the bias correction of all later updates is another"""

    def wrong(config):
        right = make(config)

        def update(grads, state, params=None, **options):
            updates, new = right.update(grads, state, params, **options)
            return updates, new._replace(count=state.count + 1)

        return optax.GradientTransformationExtraArgs(right.init, update)

    return wrong
