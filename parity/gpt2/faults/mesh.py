"""Mistakes of what devices exchange."""

import jax

import gpt2_jax.sharding
import gpt2_jax.train_step
from parity.gpt2.faults.fault import fault, replacing


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


@fault(
    "gradients added over one axis of a mesh",
    check="mesh",
    place="data=2, fsdp=4",
    part="data=2, fsdp=4",
    seam=(gpt2_jax.train_step, "exchange"),
)
def gradients_added_over_one_axis_of_a_mesh(exchange):
    """reduce-scattered over fsdp, and the all-reduce over data forgotten: either axis by itself is right"""

    def wrong(grads, axes, dtype, **options):
        def one_axis(batch_axes):
            return lambda: tuple(name for name in batch_axes() if name == "fsdp") or batch_axes()

        with replacing(gpt2_jax.sharding, "_batch_axes", one_axis)():
            return exchange(grads, axes, dtype, **options)

    return wrong
