"""Mistakes of initial weights."""

import math

import jax
import jax.numpy as jnp
import torch
from flax import nnx

import gpt2_jax.layers
import gpt2_jax.model
import gpt2_torch.model
import gpt2_torch.train
from parity.gpt2.faults.fault import fault


@fault(
    "projections into the residual stream unscaled",
    check="initialization",
    place="c_proj.weight",
    seam=(gpt2_jax.model, "_residual_std"),
)
def projections_into_the_residual_stream_unscaled(std):
    """0.02 everywhere: the 1/sqrt(2 layers) forgotten"""

    return lambda config: 0.02


@fault(
    "uniform weights of the same variance",
    check="initialization",
    place="JAX: mean, variance and normal shape of 10 tensors, -log10 p shape of wte.weight",
    seam=(gpt2_jax.layers, "_normal"),
)
def uniform_weights_of_the_same_variance(normal):
    """Xavier's or Kaiming's uniform form, scaled to the right standard deviation"""

    return lambda rngs, shape: jax.random.uniform(rngs.params(), shape, jnp.float32, -math.sqrt(3), math.sqrt(3))


@fault(
    "truncated normal weights",
    check="initialization",
    place="JAX: mean, variance and normal shape of 10 tensors, -log10 p shape of wte.weight",
    seam=(gpt2_jax.layers, "_normal"),
)
def truncated_normal_weights(normal):
    """the truncated_normal of JAX's and Flax's initialisers, which scale it to the variance asked for"""

    # 0.88 is the standard deviation of a normal distribution that is cut at two.
    return lambda rngs, shape: jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32) / 0.87962566


@fault(
    "every layer begins alike",
    check="initialization",
    place="h.0.attn.c_attn.weight with h.1.attn.c_attn.weight",
    seam=(gpt2_jax.model.Block, "__init__"),
)
def every_layer_begins_alike(init):
    """one key given to each block: layers are copies, and the symmetry between them is never broken by the weights"""

    def wrong(self, config, execution, rngs):
        init(self, config, execution, nnx.Rngs(params=jax.random.fold_in(rngs.params.key[...], 1)))

    return wrong


@fault(
    "PyTorch's own biases",
    check="initialization",
    place="PyTorch: biases that aren't 0",
    seam=(gpt2_torch.model.GPT2, "initialize"),
)
def pytorch_own_biases(initialize):
    """nn.Linear draws its bias, and GPT-2's is zero"""

    def wrong(self):
        drawn = {n: p.detach().clone() for n, p in self.named_parameters() if n.endswith(".bias")}
        initialize(self)
        for name, bias in drawn.items():
            self.get_parameter(name).data.copy_(bias)

    return wrong


@fault(
    "a run's weights not from its seed",
    check="trainer",
    place="PyTorch: initial weights of a run's seed",
    seam=(gpt2_torch.train, "GPT2"),
)
def a_run_weights_not_from_its_seed(model):
    """seeded after the model is made: the same run twice begins with other weights"""

    def wrong(config):
        torch.seed()
        return model(config)

    return wrong
