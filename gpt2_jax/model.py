"""GPT-2 as Flax NNX modules, and its definition as pure functions of a flat dict of parameters.

Shapes: B batch, T time, S slots of a KV cache, D embedding, H heads, K head size, F MLP width, V vocabulary,
N layers. M is B x T.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_core.config import ModelConfig
from gpt2_core.weights.layouts import JAX
from gpt2_jax.alibi import alibi_slopes
from gpt2_jax.attention import Kernel, cached_attention, causal_attention
from gpt2_jax.capture import is_tapping, scope, tap
from gpt2_jax.dropout import dropout, site
from gpt2_jax.layers import Embedding, LayerNorm, Linear, RMSNorm, add_norm, rounded_once
from gpt2_jax.loss import summed_cross_entropy
from gpt2_jax.norm_kernels import NormKernel
from gpt2_jax.products import wide_einsum
from gpt2_jax.rope import rotate
from gpt2_jax.sharding import Axes, constrain

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the model computes, as against what: changes no result beyond rounding."""

    dtype: str = "float32"
    """Of matrix products and what lies between them. The residual stream stays in the parameters' dtype."""
    attention: Kernel = "xla"
    scan_layers: bool = False
    remat: bool = False
    norm: NormKernel = "xla"

    @property
    def param_dtype(self) -> jnp.dtype:
        return jnp.dtype("float64" if self.dtype == "float64" else "float32")


class LayerCache(NamedTuple):
    """Keys and values of the tokens that one layer has seen, each (B, H, S, K)."""

    k_BHSK: jax.Array
    v_BHSK: jax.Array


def make_norm(config: ModelConfig, execution: Execution) -> LayerNorm | RMSNorm:
    """The norm over the embedding that the configuration asks for."""
    make = {"epsilon": config.layer_norm_epsilon, "dtype": execution.dtype, "param_dtype": execution.param_dtype}
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, axis="embed", **make)
    return LayerNorm(config.n_embd, bias=config.bias, kernel=execution.norm, **make)


class CausalSelfAttention(nnx.Module):
    """Multi-head attention in which a token sees itself and what precedes it (Vaswani et al. 2017)."""

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
            a_BTF = _recomputed(functools.partial(jax.nn.gelu, approximate=self.config.mlp == "gelu_tanh"))(a_BTF)
        a_BTF = tap("mlp.activation", constrain(a_BTF, "batch", None, "mlp"))
        return dropout(tap("mlp.c_proj", self.c_proj(a_BTF)), self.config.dropout, key)


class Block(nnx.Module):
    """Attention, then MLP, each behind a layer norm and added to the residual stream.

    The residual stream comes and goes in two parts, x and a branch that the next norm adds to it, because the two can
    be one pass over memory.
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
    """The residual stream in two parts; in one while values are tapped, so that there is a sum to see."""
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
        """Summed cross-entropy of the targets that aren't IGNORED, in float32 at least."""
        x_BTD = self.hidden(tokens_BT, dropout_keys_B=dropout_keys_B)
        return summed_cross_entropy(x_BTD, self._head(), targets_BT, self.config.vocab_size)

    def hidden(self, tokens_BT: jax.Array, *, dropout_keys_B: jax.Array | None = None) -> jax.Array:
        """What the head sees: (B, T, D) after the last layer norm."""
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
        # Cut afterwards: the head without its padding would be a copy of it, at each token that is generated.
        return tap("logits", wide_einsum("btd,vd->btv", x_BTD, head_VD)[..., : self.config.vocab_size])

    def decode(
        self, tokens_BT: jax.Array, start_B: jax.Array, caches: list[LayerCache]
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Hidden states (B, T, D) of T more tokens, each sequence's first at its own position `start_B`.

        The caches take their keys and values; a sequence may be rewound by giving a smaller start later.
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
                # What is kept of a block is its input: one array, and not the two parts of it.
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


@dataclasses.dataclass(frozen=True)
class Definition:
    """A model without its parameters: the NNX graph, split off once, and what the parameters look like.

    Parameters are a flat dict by canonical name ("h.0.attn.c_attn.weight"); their shapes are this package's own
    (gpt2_jax.weights says where they differ from the canonical ones).
    """

    config: ModelConfig
    execution: Execution
    graph: nnx.GraphDef
    abstract: Mapping[str, jax.ShapeDtypeStruct]
    logical_axes: Mapping[str, Axes]
    narrow: frozenset[str]
    """Names of the parameters that are rounded to the compute dtype wherever they are used."""

    def merge(self, params: Mapping[str, jax.Array]) -> GPT2:
        """The model with these parameters; free inside a traced function."""
        flat = [(_path(name), value) for name, value in params.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def initialize(self, key: jax.Array) -> Params:
        """Random parameters: the same for a key on any mesh and in any precision."""
        _, state = nnx.split(GPT2(self.config, self.execution, nnx.Rngs(params=key)))
        return {_name(path): variable[...] for path, variable in nnx.to_flat_state(state)}

    def empty_caches(self, batch: int, slots: int) -> list[LayerCache]:
        shape = (batch, self.config.n_head, slots, self.config.head_size)
        dtype = jnp.dtype(self.execution.dtype)
        return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.config.n_layer)]


def define(config: ModelConfig, execution: Execution) -> Definition:
    """Build the graph of a model without computing anything."""
    model = nnx.eval_shape(lambda: GPT2(config, execution, nnx.Rngs(params=0)))
    graph, state = nnx.split(model)
    variables = {_name(path): variable for path, variable in nnx.to_flat_state(state)}
    return Definition(
        config,
        execution,
        graph,
        {name: variable.get_value() for name, variable in variables.items()},
        {name: variable.get_metadata()["logical_axes"] for name, variable in variables.items()},
        frozenset(name for name, variable in variables.items() if variable.get_metadata().get("narrow")),
    )


def padded_vocab_size(vocab_size: int) -> int:
    """The vocabulary as it is inside, padded to what matrix units like and a tensor axis divides. The padding rows are
    zero, take no part in any softmax and never leave this package."""
    multiple = JAX.vocabulary_multiple
    return math.ceil(vocab_size / multiple) * multiple


def _silu_gated(gate_BTF: jax.Array, value_BTF: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_BTF) * value_BTF


def _recomputed(activation):
    """An elementwise function whose backward pass keeps nothing but its inputs: reading them again costs less memory
    traffic than the intermediate values that autodiff would keep."""
    return jax.checkpoint(rounded_once(activation))


def _residual_std(config: ModelConfig) -> float:
    # Projections into the residual stream start smaller, so that its variance doesn't grow with depth
    # (Radford et al. 2019, section 2.3).
    return 0.02 / math.sqrt(2 * config.n_layer)


def _write(cache: LayerCache, k_BHTK: jax.Array, v_BHTK: jax.Array, start_B: jax.Array) -> LayerCache:
    def place(cached_SK, new_TK, start):
        return jax.lax.dynamic_update_slice(cached_SK, new_TK, (start, 0))

    # A start for each head makes a scatter of it at batch 1 too. Of a dynamic_update_slice that is read afterwards
    # XLA's CPU compiler makes several copies of the whole cache, at every token.
    start_BH = jnp.broadcast_to(start_B[:, None], k_BHTK.shape[:2])
    place_all = jax.vmap(jax.vmap(place))
    return LayerCache(place_all(cache.k_BHSK, k_BHTK, start_BH), place_all(cache.v_BHSK, v_BHTK, start_BH))


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
