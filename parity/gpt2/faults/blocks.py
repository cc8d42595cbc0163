"""Mistakes of what surrounds attention: embeddings, norms, residual connections, MLP, head."""

import dataclasses
import math

import jax
import jax.numpy as jnp

import gpt2_jax.layers
import gpt2_jax.model
import gpt2_jax.norm_kernels
from gpt2_jax.capture import tap
from parity.gpt2.faults.fault import MODEL, fault


class _NoNorm(gpt2_jax.layers.LayerNorm):
    def __call__(self, x):
        return x


@fault(
    "erf GELU",
    check="forward",
    place="block 0, mlp activation",
    seam=(gpt2_jax.model, "_gelu"),
)
def erf_gelu(gelu):
    """torch.nn.GELU() is the erf form, GPT-2's is tanh; nanoGPT's model.py has nn.GELU()
    (github.com/karpathy/nanoGPT)"""

    return lambda a, *, approximate: gelu(a, approximate=False)


@fault(
    "sigmoid GELU",
    check="forward",
    place="block 0, mlp activation",
    seam=(gpt2_jax.model, "_gelu"),
)
def sigmoid_gelu(gelu):
    """CLIP's quick_gelu, x sigmoid(1.702 x), taken over with its code"""

    return lambda a, *, approximate: a * jax.nn.sigmoid(1.702 * a)


@fault(
    "epsilon 1e-6",
    check="forward",
    place="block 0, ln_1",
    seam=(gpt2_jax.layers.LayerNorm, "__init__"),
)
def epsilon_1e_6(init):
    """flax.linen.LayerNorm's default where GPT-2 has 1e-5"""

    return lambda self, size, **options: init(self, size, **options | {"epsilon": 1e-6})


@fault(
    "untied head",
    check="forward",
    place="logits",
    seam=(gpt2_jax.model.GPT2, "_head"),
)
def untied_head(head):
    """a head with a weight of its own, initialised apart from the embedding"""

    def wrong(self):
        tied = head(self)
        return tied + 0.02 * jax.random.normal(jax.random.key(7), tied.shape, tied.dtype)

    return wrong


@fault(
    "head tied but not updated",
    check="gradients",
    place="wte weight",
    seam=(gpt2_jax.model.GPT2, "_head"),
)
def head_tied_but_not_updated(head):
    """the head uses a copy of the embedding: right until the first update"""

    return lambda self: jax.lax.stop_gradient(head(self))


@fault(
    "positions from one",
    check="forward",
    place="embeddings",
    seam=(gpt2_jax.model.GPT2, "_embed"),
)
def positions_from_one(embed):
    """position ids that leave room for padding, as in RoBERTa"""

    def wrong(self, tokens, positions):
        return embed(self, tokens, jnp.minimum(positions + 1, self.config.block_size - 1))

    return wrong


@fault(
    "embeddings scaled by sqrt(n_embd)",
    check="forward",
    place="embeddings",
    seam=(gpt2_jax.model.GPT2, "_embed"),
)
def embeddings_scaled_by_sqrt_n_embd(embed):
    """what the original transformer and Gemma do, and GPT-2 doesn't"""

    return lambda self, *inputs: embed(self, *inputs) * math.sqrt(self.config.n_embd)


@fault(
    "missing ln_f",
    check="forward",
    place="ln_f",
    seam=(gpt2_jax.model.GPT2, "__init__"),
)
def missing_ln_f(init):
    """GPT-1 has no layer norm before the head"""

    def wrong(self, *args):
        init(self, *args)
        self.ln_f.__class__ = _NoNorm

    return wrong


@fault(
    "post-norm",
    check="forward",
    place="block 0",
    seam=(gpt2_jax.model.Block, "__call__"),
)
def post_norm(call):
    """GPT-1's order: the norm after the addition"""

    def wrong(self, x, branch, positions, *, cache=None, key=None):
        out, cache = self.attn(x, cache=cache, positions=positions, key=None)
        x = tap("residual_1", tap("ln_1", self.ln_1(x + out)))
        return tap("residual_2", tap("ln_2", self.ln_2(x + self.mlp(x, key=None)))), None, cache

    return wrong


@fault(
    "residual from after the norm",
    check="forward",
    place="block 0, residual_1",
    seam=(gpt2_jax.model.Block, "__call__"),
)
def residual_from_after_the_norm(call):
    """apply_residual_connection_post_layernorm, BLOOM's option"""

    def wrong(self, x, branch, positions, *, cache=None, key=None):
        a = tap("ln_1", self.ln_1(x))
        out, cache = self.attn(a, cache=cache, positions=positions, key=None)
        x = tap("residual_1", a + out)
        return tap("residual_2", x + self.mlp(tap("ln_2", self.ln_2(x)), key=None)), None, cache

    return wrong


@fault(
    "SwiGLU's gate and value swapped",
    check="forward",
    place="block 0, mlp activation",
    seam=(gpt2_jax.model.MLP, "__call__"),
    model=dataclasses.replace(MODEL, mlp="swiglu"),
)
def swiglu_gate_and_value_swapped(call):
    """which of the two projections goes through the sigmoid"""

    def wrong(self, x, *, key):
        value, gate = tap("mlp.c_fc", self.c_fc(x)), tap("mlp.c_gate", self.c_gate(x))
        return tap("mlp.c_proj", self.c_proj(tap("mlp.activation", jax.nn.silu(value) * gate)))

    return wrong


@fault(
    "exact GELU asked for, tanh GELU computed",
    check="forward",
    place="JAX looks like tanh GELU, and the configuration asks for mlp gelu_exact",
    seam=(gpt2_jax.model, "_gelu"),
    model=dataclasses.replace(MODEL, mlp="gelu_exact"),
)
def exact_gelu_asked_for_tanh_gelu_computed(gelu):
    """a setting that one side reads and the other ignores: the side that ignores it is to blame"""

    return lambda a, *, approximate: gelu(a, approximate=True)


@fault(
    "logits of the last position only",
    check="forward",
    place="logits: shape (1, 1, 257) in JAX, (1, 16, 257) in PyTorch",
    seam=(gpt2_jax.model.GPT2, "logits"),
)
def logits_of_the_last_position_only(logits):
    """what decoding needs, returned where all are asked for: numpy would repeat it and compare"""

    return lambda self, x: logits(self, x[:, -1:])


@fault(
    "RMS norm's epsilon written into the code",
    check="settings",
    place="forward: block 0, ln_1",
    part="rotary, RMS norm, no warmup, no clipping",
    seam=(gpt2_jax.layers.RMSNorm, "__init__"),
)
def rms_norm_epsilon_written_into_the_code(init):
    """LayerNorm takes the configured one and RMSNorm, added later, has a constant"""

    return lambda self, size, **options: init(self, size, **options | {"epsilon": 1e-5})


@fault(
    "layers in the order of their names",
    check="sizes",
    place="11 layers, scanned",
    part="training",
    seam=(gpt2_jax.model.GPT2, "_scan_blocks"),
)
def layers_in_the_order_of_their_names(scan):
    """sorted as text, h.10 comes before h.2: right up to ten layers"""

    def wrong(self, *inputs):
        blocks = list(self.h)
        self.h = type(self.h)([blocks[number] for number in sorted(range(len(blocks)), key=str)])
        return scan(self, *inputs)

    return wrong


@fault(
    "the norm kernel's padding takes part",
    check="sizes",
    place="norm kernel: 20 wide",
    part="norm kernel",
    seam=(gpt2_jax.norm_kernels, "_normalize"),
)
def the_norm_kernel_padding_takes_part(normalize):
    """lanes beyond the width are centred too: right for widths that are powers of two, wrong for 768"""

    return lambda x, mask, D, epsilon: normalize(x, mask | True, D, epsilon)
