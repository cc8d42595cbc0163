"""GPT-2 as Flax NNX modules.

Shapes: B batch, T time, S slots of a KV cache, D embedding, H heads, K head size, F MLP width, V vocabulary,
N layers. M is B x T.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_core.config import VOCABULARY_MULTIPLE, ModelConfig
from gpt2_jax.alibi import alibi_slopes
from gpt2_jax.attention import Kernel, cached_attention, causal_attention
from gpt2_jax.capture import is_tapping, scope, tap
from gpt2_jax.dropout import dropout, site
from gpt2_jax.einsum import einsum_f32
from gpt2_jax.layers import Embedding, LayerNorm, Linear, RMSNorm, add_norm, rounded_once
from gpt2_jax.loss import log_probabilities, summed_cross_entropy
from gpt2_jax.norm_kernels import NormKernel
from gpt2_jax.rope import rotate
from gpt2_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the model computes, and not what: it changes no result beyond rounding."""

    dtype: str = "float32"
    """Of matrix products and the activations between them. The residual stream stays in the parameters' dtype."""
    attention: Kernel = "xla"
    scan_layers: bool = False
    remat: bool = False
    norm: NormKernel = "xla"

    @property
    def param_dtype(self) -> jnp.dtype:
        return jnp.dtype("float64" if self.dtype == "float64" else "float32")


class LayerCache(NamedTuple):
    """The KV cache of one layer: keys and values of earlier tokens, each (B, H, S, K)."""

    k_BHSK: jax.Array
    v_BHSK: jax.Array


def make_norm(config: ModelConfig, execution: Execution) -> LayerNorm | RMSNorm:
    """The norm over the embedding that the configuration asks for."""
    make = {"epsilon": config.layer_norm_epsilon, "dtype": execution.dtype, "param_dtype": execution.param_dtype}
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, axis="embed", **make)
    return LayerNorm(config.n_embd, bias=config.bias, kernel=execution.norm, **make)


class CausalSelfAttention(nnx.Module):
    """Causal multi-head attention (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        D = config.n_embd
        make = {"bias": config.bias, "param_dtype": execution.param_dtype, "rngs": rngs}
        self.c_attn = Linear((D, 3, D), ("embed", "qkv", "heads"), std=0.02, **make)
        self.c_proj = Linear((D, D), ("heads", "embed"), std=_residual_std(config), **make)
        norm = {"epsilon": config.layer_norm_epsilon, "dtype": execution.dtype, "param_dtype": execution.param_dtype}
        self.q_norm = RMSNorm(config.head_size, axis=None, **norm) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, axis=None, **norm) if config.qk_norm else None
        self.config, self.kernel = config, execution.attention

    def __call__(
        self, x_BTD: jax.Array, *, cache: LayerCache | None, positions: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            constrain(
                out_BTD.reshape(B, T, config.n_head, config.head_size).transpose(0, 2, 1, 3),
                "batch",
                "heads",
                None,
                None,
            )
            for out_BTD in self.c_attn.split(x_BTD)
        )
        if config.qk_norm:
            q_BHTK, k_BHTK = self.q_norm(q_BHTK), self.k_norm(k_BHTK)
        if config.position == "rope":
            q_BHTK, k_BHTK = (rotate(x, positions, config) for x in (q_BHTK, k_BHTK))
        q_BHTK, k_BHTK, v_BHTK = tap("attn.q", q_BHTK), tap("attn.k", k_BHTK), tap("attn.v", v_BHTK)
        slopes = alibi_slopes(config.n_head) if config.position == "alibi" else None
        if cache is None:
            out_BHTK = causal_attention(
                q_BHTK, k_BHTK, v_BHTK, kernel=self.kernel, rate=config.dropout, key=site(key, 0), slopes=slopes
            )
        else:
            cache = _write(cache, k_BHTK, v_BHTK, positions[:, 0])
            out_BHTK = cached_attention(q_BHTK, *cache, positions, slopes)
        out_BTD = tap("attn.out", out_BHTK.transpose(0, 2, 1, 3).reshape(B, T, D))
        return dropout(tap("attn.c_proj", self.c_proj(out_BTD)), config.dropout, site(key, 1)), cache


class MLP(nnx.Module):
    """Two linear layers with GELU between them (Hendrycks & Gimpel 2016), in GPT-2's tanh form or exact; or three,
    SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        D, F = config.n_embd, config.mlp_size
        make = {"bias": config.bias, "param_dtype": execution.param_dtype, "rngs": rngs}
        self.c_fc = Linear((D, F), ("embed", "mlp"), std=0.02, **make)
        self.c_gate = Linear((D, F), ("embed", "mlp"), std=0.02, **make) if config.mlp == "swiglu" else None
        self.c_proj = Linear((F, D), ("mlp", "embed"), std=_residual_std(config), **make)
        self.config = config

    def __call__(self, x_BTD: jax.Array, *, key: jax.Array | None) -> jax.Array:
        a_BTF = tap("mlp.c_fc", self.c_fc(x_BTD))
        if self.config.mlp == "swiglu":
            a_BTF = _recomputed(_silu_gated)(tap("mlp.c_gate", self.c_gate(x_BTD)), a_BTF)
        else:
            a_BTF = _recomputed(functools.partial(_gelu, approximate=self.config.mlp == "gelu_tanh"))(a_BTF)
        a_BTF = tap("mlp.activation", constrain(a_BTF, "batch", None, "mlp"))
        return dropout(tap("mlp.c_proj", self.c_proj(a_BTF)), self.config.dropout, key)


class Block(nnx.Module):
    """Attention, then MLP, each behind a layer norm and added to the residual stream.

    The residual stream is passed in two parts, x and a branch that the next norm adds to it, because addition and norm
    can then be one pass over memory.
    """

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        self.ln_1 = make_norm(config, execution)
        self.attn = CausalSelfAttention(config, execution, rngs)
        self.ln_2 = make_norm(config, execution)
        self.mlp = MLP(config, execution, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        branch_BTD: jax.Array | None,
        positions: jax.Array,
        *,
        cache: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, LayerCache | None]:
        """`positions` are (T,), or with a cache (B, T): each sequence's own."""
        x_BTD, a_BTD = add_norm(self.ln_1, x_BTD, branch_BTD)
        out_BTD, cache = self.attn(tap("ln_1", a_BTD), cache=cache, positions=positions, key=site(key, 0))
        x_BTD, a_BTD = add_norm(self.ln_2, *_residual("residual_1", x_BTD, out_BTD))
        out_BTD = self.mlp(tap("ln_2", a_BTD), key=site(key, 1))
        return *_residual("residual_2", x_BTD, out_BTD), cache


def _residual(name: str, x_BTD: jax.Array, branch_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The residual stream in two parts; in one while values are tapped, so that the sum exists."""
    branch_BTD = constrain(branch_BTD, "batch", None, None)
    return (tap(name, x_BTD + branch_BTD), None) if is_tapping() else (x_BTD, branch_BTD)


class GPT2(nnx.Module):
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        D, V = config.n_embd, config.vocab_size
        make = {"std": 0.02, "param_dtype": execution.param_dtype, "rngs": rngs}
        table = (padded_vocab_size(V), D, ("vocab", "embed"))
        self.wte = Embedding(*table, used=V, **make)
        positions = (config.block_size, D, ("positions", "embed"))
        self.wpe = Embedding(*positions, used=config.block_size, **make) if config.position == "learned" else None
        self.h = nnx.List([Block(config, execution, rngs) for _ in range(config.n_layer)])
        self.ln_f = make_norm(config, execution)
        self.lm_head = None if config.tie_embeddings else Embedding(*table, used=V, narrow=True, **make)
        self.config, self.execution = config, execution

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits (B, T, V), in float32 at least."""
        return self.logits(self.hidden(tokens_BT))

    def loss(
        self, tokens_BT: jax.Array, targets_BT: jax.Array, *, dropout_keys_B: jax.Array | None = None
    ) -> jax.Array:
        """Summed cross-entropy of the targets that aren't IGNORE_INDEX, in float32 at least."""
        x_BTD = self.hidden(tokens_BT, dropout_keys_B=dropout_keys_B)
        return summed_cross_entropy(x_BTD, self._head(), targets_BT, self.config.vocab_size)

    def log_probabilities(self, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each target (B, T) its log-probability, in float32 at least, and whether it is the likeliest token."""
        return log_probabilities(self.hidden(tokens_BT), self._head(), targets_BT, self.config.vocab_size)

    def hidden(self, tokens_BT: jax.Array, *, dropout_keys_B: jax.Array | None = None) -> jax.Array:
        """The input of the head: (B, T, D) after the last layer norm."""
        positions_T = jnp.arange(tokens_BT.shape[1])
        x_BTD = self._embed(tokens_BT, positions_T)
        x_BTD = dropout(tap("embeddings", x_BTD), self.config.dropout, site(dropout_keys_B, 0))
        if is_tapping() and (self.execution.scan_layers or self.execution.remat):
            raise ValueError(
                "intermediate values are tapped in unrolled layers only: scan_layers and remat must be off"
            )
        branch_BTD = None
        if self.execution.scan_layers:
            x_BTD, branch_BTD = self._scan_blocks(x_BTD, positions_T, dropout_keys_B)
        else:
            for number, block in enumerate(self.h, start=1):
                graph, state = nnx.split(block)
                with scope(f"h.{number - 1}."):
                    x_BTD, branch_BTD = self._block_function(graph)(
                        state, x_BTD, branch_BTD, positions_T, site(dropout_keys_B, number)
                    )
        return tap("ln_f", add_norm(self.ln_f, x_BTD, branch_BTD)[1])

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head's scores of the vocabulary."""
        head_VD = self._head().astype(x_BTD.dtype)
        # Sliced afterwards: slicing the head instead would copy it for each token that is generated.
        return tap("logits", einsum_f32("btd,vd->btv", x_BTD, head_VD)[..., : self.config.vocab_size])

    def decode(
        self, tokens_BT: jax.Array, start_B: jax.Array, caches: list[LayerCache]
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Hidden states (B, T, D) of T more tokens, each sequence's first at its own position `start_B`.

        Their keys and values are written to the caches; a smaller start later rewinds a sequence.
        """
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
        x_BTD, branch_BTD = self._embed(tokens_BT, positions_BT), None
        grown = []
        for number, (block, cache) in enumerate(zip(self.h, caches, strict=True)):
            with scope(f"h.{number}."):
                x_BTD, branch_BTD, cache = block(x_BTD, branch_BTD, positions_BT, cache=cache)
            grown.append(cache)
        return add_norm(self.ln_f, x_BTD, branch_BTD)[1], grown

    def _embed(self, tokens_BT: jax.Array, positions: jax.Array) -> jax.Array:
        x_BTD = self.wte(tokens_BT)
        if self.wpe is not None:
            x_BTD = x_BTD + self.wpe(positions)
        return constrain(x_BTD, "batch", None, None)

    def _head(self) -> jax.Array:
        """The head's weights (V, D)."""
        return (self.wte if self.lm_head is None else self.lm_head).weight[...]

    def _block_function(self, graph: nnx.GraphDef):
        """A block as a pure function of its parameters."""

        def apply(state, x_BTD, branch_BTD, positions_T, key):
            x_BTD, branch_BTD, _ = nnx.merge(graph, state)(x_BTD, branch_BTD, positions_T, key=key)
            if self.execution.remat and branch_BTD is not None:
                # The input of a block is kept for the backward pass: as one array instead of two.
                x_BTD, branch_BTD = x_BTD + branch_BTD, None
            return x_BTD, branch_BTD

        return jax.checkpoint(apply) if self.execution.remat else apply

    def _scan_blocks(
        self, x_BTD: jax.Array, positions_T: jax.Array, dropout_keys_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        graphs, states = zip(*(nnx.split(block) for block in self.h), strict=True)
        apply = self._block_function(graphs[0])

        def step(residual, layer):
            number, state = layer
            return apply(state, *residual, positions_T, site(dropout_keys_B, number)), None

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        numbers = jnp.arange(1, len(states) + 1)
        branch_BTD = None if self.execution.remat else jnp.zeros(x_BTD.shape, self.execution.dtype)
        return jax.lax.scan(step, (x_BTD, branch_BTD), (numbers, stacked))[0]


def padded_vocab_size(vocab_size: int) -> int:
    """The size of the vocabulary inside this package. The padding rows are zero, take no part in any softmax and are
    removed from everything that leaves the package."""
    return math.ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _gelu(a_BTF: jax.Array, *, approximate: bool) -> jax.Array:
    return jax.nn.gelu(a_BTF, approximate=approximate)


def _silu_gated(gate_BTF: jax.Array, value_BTF: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_BTF) * value_BTF


def _recomputed(activation):
    """An elementwise function that is recomputed in the backward pass from its inputs, which takes less memory traffic
    than the intermediate values that autodiff would save."""
    return jax.checkpoint(rounded_once(activation))


def _residual_std(config: ModelConfig) -> float:
    # Projections into the residual stream start smaller, so that its variance doesn't grow with depth
    # (Radford et al. 2019, section 2.3).
    return 0.02 / math.sqrt(2 * config.n_layer)


def _write(cache: LayerCache, k_BHTK: jax.Array, v_BHTK: jax.Array, start_B: jax.Array) -> LayerCache:
    def write(cached_SK, new_TK, start):
        return jax.lax.dynamic_update_slice(cached_SK, new_TK, (start, 0))

    # With one start a head this is a scatter, at batch 1 too. For a dynamic_update_slice that is read later, XLA's CPU
    # compiler would copy the whole cache several times a token.
    start_BH = jnp.broadcast_to(start_B[:, None], k_BHTK.shape[:2])
    write_all = jax.vmap(jax.vmap(write))
    return LayerCache(write_all(cache.k_BHSK, k_BHTK, start_BH), write_all(cache.v_BHSK, v_BHTK, start_BH))
