"""Mistakes of what devices exchange."""

import jax

import gpt2_jax.train_step
from parity.gpt2.faults.fault import fault


@fault(
    "gradient sum over shards",
    check="mesh",
    place="data=2",
    seam=(gpt2_jax.train_step, "loss_and_grads"),
)
def gradient_sum_over_shards(loss_and_grads):
    """psum instead of pmean"""

    def wrong(definition, *arguments, **options):
        loss, grads = loss_and_grads(definition, *arguments, **options)
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        return loss, jax.tree.map(lambda g: g * shards, grads)

    return wrong
