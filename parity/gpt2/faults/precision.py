"""Mistakes of precision: what is rounded, and where."""

import jax
import jax.numpy as jnp

import gpt2_jax.attention
import gpt2_jax.layers
import gpt2_jax.loss
import gpt2_jax.model
import gpt2_jax.train_step
from parity.gpt2.faults.fault import fault


@fault(
    "TF32 instead of float32",
    check="precision",
    place="float32 logits",
    part="errors",
    seam=(gpt2_jax.layers.Linear, "__call__"),
)
def tf32_in_the_place_of_float32(call):
    """JAX's default for float32 products on Ampere and later; emulated by rounding"""

    def rounded(x):
        # Ten of float32's 23 bits of mantissa, as a tensor core takes them.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return jax.lax.bitcast_convert_type((bits + 0x1000) & jnp.uint32(0xFFFFE000), jnp.float32)

    def wrong(self, x):
        if x.dtype != jnp.float32:
            return call(self, x)
        weight = self.weight[...]
        out = jnp.tensordot(rounded(x), rounded(weight), axes=1)
        return out + self.bias[...]

    return wrong


@fault(
    "layer norm in bfloat16",
    check="precision",
    place="bfloat16 logits",
    part="errors",
    seam=(gpt2_jax.layers.LayerNorm, "__call__"),
    prepare=lambda name, a: a + 3.0 if name == "wpe.weight" else a,
)
def layer_norm_in_bfloat16(call):
    """statistics taken in the compute dtype"""

    def wrong(self, x):
        x = x.astype(jnp.dtype(self.dtype))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        weight, bias = self.weight[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return centred * jax.lax.rsqrt(variance + self.epsilon).astype(x.dtype) * weight + bias

    return wrong


@fault(
    "layer norm's fast variance",
    check="precision",
    place="float32 logits",
    part="errors",
    seam=(gpt2_jax.layers.LayerNorm, "__call__"),
    prepare=lambda name, a: a + 30.0 if name == "wpe.weight" else a,
)
def layer_norm_fast_variance(call):
    """E[x^2] - E[x]^2, Flax's default: far from zero float32 loses its digits"""

    def wrong(self, x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = x.mean(axis=-1, keepdims=True)
        variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
        out = (x - mean) * jax.lax.rsqrt(variance + self.epsilon) * self.weight[...] + self.bias[...]
        return out.astype(self.dtype)

    return wrong


@fault(
    "residual stream in bfloat16",
    check="precision",
    place="values of the residual stream",
    seam=(gpt2_jax.model, "add_norm"),
)
def residual_stream_in_bfloat16(add_norm):
    """a model cast as a whole, model.bfloat16() or param_dtype=bfloat16, adds each block to a rounded sum"""

    def wrong(norm, x, branch):
        x, _ = add_norm(norm, x, branch)
        x = x.astype(jnp.dtype(norm.dtype)).astype(x.dtype)
        return x, norm(x)

    return wrong


@fault(
    "attention's softmax in bfloat16",
    check="precision",
    place="bfloat16 program, unrolled: softmax and loss",
    seam=(gpt2_jax.attention, "_weights"),
)
def attention_softmax_in_bfloat16(weights):
    """scores left in the operands' dtype: preferred_element_type forgotten"""

    def wrong(q, k, mask, *_):
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k) * (q.shape[-1] ** -0.5)
        return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)

    return wrong


@fault(
    "logits in bfloat16",
    check="precision",
    place="bfloat16 program, unrolled: softmax and loss",
    seam=(gpt2_jax.loss, "_wide"),
)
def logits_in_bfloat16(_):
    """the head's product rounded to its operands' dtype before the loss, as PyTorch's autocast does"""

    return lambda x: x.dtype


@fault(
    "gradients of weights rounded to bfloat16",
    check="precision",
    place="bfloat16 program, unrolled: gradients of parameters",
    seam=(gpt2_jax.layers, "_project"),
)
def gradients_of_weights_rounded_to_bfloat16(project):
    """autodiff of x @ w.astype(x.dtype) makes w's gradient in x's dtype"""

    def wrong(x, w, b):
        outs = [x @ w[:, n].astype(x.dtype) for n in range(w.shape[1])]
        return outs if b is None else [out + b[n].astype(out.dtype) for n, out in enumerate(outs)]

    return wrong


@fault(
    "gradients accumulated in bfloat16",
    check="precision",
    place="bfloat16 program, unrolled: gradients of parameters",
    seam=(gpt2_jax.train_step, "_sum_over_parts"),
)
def gradients_accumulated_in_bfloat16(sum_over_parts):
    """parts of a batch added up in the compute dtype"""

    def wrong(of_part, parts):
        def narrow(part):
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16), of_part(part))

        return jax.tree.map(lambda x: x.astype(jnp.float32), sum_over_parts(narrow, parts))

    return wrong


@fault(
    "what rematerialisation keeps in bfloat16",
    check="precision",
    place="scanned and rematerialised: values of the residual stream",
    seam=(gpt2_jax.model.GPT2, "_block_function"),
)
def what_rematerialisation_keeps_in_bfloat16(block_function):
    """a block's input rounded to save memory, in this way of executing it only"""

    def wrong(self, graph):
        apply = block_function(self, graph)

        def rounded(*inputs):
            x, branch = apply(*inputs)
            return (x.astype(jnp.bfloat16).astype(x.dtype) if self.execution.remat else x), branch

        return rounded

    return wrong


@fault(
    "gradients exchanged as they are computed",
    check="precision",
    place="gradients exchanged in another dtype than float32",
    seam=(gpt2_jax.train_step, "_exchange_dtype"),
)
def gradients_exchanged_as_they_are_computed(_):
    """the dtype of the run instead of the one that was asked for"""

    return lambda config: "bfloat16" if config.precision == "bfloat16" else None


@fault(
    "a product at JAX's default precision",
    check="precision",
    place="products that may be done in TF32",
    seam=(gpt2_jax.model, "einsum_f32"),
)
def a_product_at_jax_default_precision(_):
    """precision=DEFAULT written at one product: TF32 on a GPU, and nothing to see on a CPU"""

    def wrong(spec, x, y):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum(spec, x, y, precision="default", preferred_element_type=wide)

    return wrong


@fault(
    "every parameter gathered in bfloat16",
    check="precision",
    place="bfloat16 step on data=2,fsdp=2: norms' weights",
    seam=(gpt2_jax.train_step, "gather"),
)
def every_parameter_gathered_in_bfloat16(gather):
    """half the bytes for all of them, embeddings and norms too, which one device keeps in float32"""

    return lambda params, axes, mesh, _, dtype: gather(params, axes, mesh, frozenset(params), dtype)


@fault(
    "squares of bfloat16, added in float32",
    check="precision",
    place="rmsnorm and swiglu: sums over features",
    seam=(gpt2_jax.layers.RMSNorm, "__call__"),
)
def squares_of_bfloat16_added_in_float32(call):
    """the conversion after the product instead of before: the sum is wide, and what it adds is rounded"""

    def wrong(self, x):
        if x.dtype != jnp.bfloat16:
            return call(self, x)
        square = jnp.square(x).astype(jnp.float32)
        scale = jax.lax.rsqrt(square.mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * scale * self.weight[...]).astype(self.dtype)

    return wrong
