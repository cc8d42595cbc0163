"""GPT-2 as Flax NNX modules, and its definition as pure functions of a flat dict of parameters.

Shapes: B batch, T time, S places of a KV cache, D embedding, H heads, K head size, F MLP width, V vocabulary,
N layers. M is B x T.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_core.config import ModelConfig
from gpt2_jax.attention import Kernel, cached_attention, causal_attention
from gpt2_jax.dropout import dropout, site
from gpt2_jax.layers import Embedding, LayerNorm, Linear
from gpt2_jax.loss import summed_cross_entropy
from gpt2_jax.products import wide_einsum
from gpt2_jax.sharding import Axes, constrain, gather

# Inside, the vocabulary is padded to a multiple of this, which matrix units like and a tensor axis divides. The
# padding rows are zero, take no part in any softmax and never leave this package.
VOCAB_MULTIPLE = 128

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the model computes, as against what: changes no result beyond rounding."""

    dtype: str = "float32"
    """Of matrix products and what lies between them. The residual stream stays in the parameters' dtype."""
    attention: Kernel = "xla"
    scan_layers: bool = False
    remat: bool = False

    @property
    def param_dtype(self) -> jnp.dtype:
        return jnp.dtype("float64" if self.dtype == "float64" else "float32")


class LayerCache(NamedTuple):
    """Keys and values of the places that one layer has seen, each (B, H, S, K)."""

    k_BHSK: jax.Array
    v_BHSK: jax.Array


class CausalSelfAttention(nnx.Module):
    """Multi-head attention in which a token sees itself and what precedes it (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        D = config.n_embd
        make = {"param_dtype": execution.param_dtype, "rngs": rngs}
        self.c_attn = Linear((D, 3, D), ("embed", "qkv", "heads"), std=0.02, **make)
        self.c_proj = Linear((D, D), ("heads", "embed"), std=_residual_std(config), **make)
        self.config, self.kernel = config, execution.attention

    def __call__(
        self, x_BTD: jax.Array, *, cache: LayerCache | None, positions_BT: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        B, T, D = x_BTD.shape
        qkv_BT3HK = self.c_attn(x_BTD).reshape(B, T, 3, config.n_head, config.head_size)
        q_BHTK, k_BHTK, v_BHTK = (
            constrain(qkv_BT3HK[:, :, i].transpose(0, 2, 1, 3), "batch", "heads", None, None) for i in range(3)
        )
        if cache is None:
            out_BHTK = causal_attention(
                q_BHTK, k_BHTK, v_BHTK, kernel=self.kernel, rate=config.dropout, key=site(key, 0)
            )
        else:
            cache = _write(cache, k_BHTK, v_BHTK, positions_BT[:, 0])
            out_BHTK = cached_attention(q_BHTK, *cache, positions_BT)
        out_BTD = out_BHTK.transpose(0, 2, 1, 3).reshape(B, T, D)
        return dropout(self.c_proj(out_BTD), config.dropout, site(key, 1)), cache


class MLP(nnx.Module):
    """Two linear layers with GPT-2's tanh form of GELU between them (Hendrycks & Gimpel 2016)."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        D, F = config.n_embd, config.mlp_width
        make = {"param_dtype": execution.param_dtype, "rngs": rngs}
        self.c_fc = Linear((D, F), ("embed", "mlp"), std=0.02, **make)
        self.c_proj = Linear((F, D), ("mlp", "embed"), std=_residual_std(config), **make)
        self.config = config

    def __call__(self, x_BTD: jax.Array, *, key: jax.Array | None) -> jax.Array:
        a_BTF = constrain(jax.nn.gelu(self.c_fc(x_BTD), approximate=True), "batch", None, "mlp")
        return dropout(self.c_proj(a_BTF), self.config.dropout, key)


class Block(nnx.Module):
    """Attention, then MLP, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        norm = {"epsilon": config.layer_norm_epsilon, "dtype": execution.dtype, "param_dtype": execution.param_dtype}
        self.ln_1 = LayerNorm(config.n_embd, **norm)
        self.attn = CausalSelfAttention(config, execution, rngs)
        self.ln_2 = LayerNorm(config.n_embd, **norm)
        self.mlp = MLP(config, execution, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        cache: LayerCache | None = None,
        positions_BT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        out_BTD, cache = self.attn(self.ln_1(x_BTD), cache=cache, positions_BT=positions_BT, key=site(key, 0))
        x_BTD = constrain(x_BTD + out_BTD, "batch", None, None)
        x_BTD = constrain(x_BTD + self.mlp(self.ln_2(x_BTD), key=site(key, 1)), "batch", None, None)
        return x_BTD, cache


class GPT2(nnx.Module):
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

    def __init__(self, config: ModelConfig, execution: Execution, rngs: nnx.Rngs) -> None:
        D, V = config.n_embd, config.vocab_size
        make = {"std": 0.02, "param_dtype": execution.param_dtype, "rngs": rngs}
        self.wte = Embedding(padded_vocab_size(V), D, ("vocab", "embed"), used=V, **make)
        self.wpe = Embedding(config.block_size, D, ("positions", "embed"), used=config.block_size, **make)
        self.h = nnx.List([Block(config, execution, rngs) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(
            D, epsilon=config.layer_norm_epsilon, dtype=execution.dtype, param_dtype=execution.param_dtype
        )
        self.config, self.execution = config, execution

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits (B, T, V), in float32 at least."""
        return self.logits(self.hidden(tokens_BT))

    def loss(self, tokens_BT: jax.Array, targets_BT: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Summed cross-entropy of the targets that aren't IGNORED, in float32 at least."""
        x_MD = self.hidden(tokens_BT, dropout_key=dropout_key).reshape(-1, self.config.n_embd)
        return summed_cross_entropy(x_MD, gather(self.wte.weight), targets_BT.reshape(-1), self.config.vocab_size)

    def hidden(self, tokens_BT: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """What the head sees: (B, T, D) after the last layer norm."""
        x_BTD = self._embed(tokens_BT, jnp.arange(tokens_BT.shape[1]))
        x_BTD = dropout(x_BTD, self.config.dropout, site(dropout_key, 0))
        if self.execution.scan_layers:
            x_BTD = self._scan_blocks(x_BTD, dropout_key)
        else:
            for number, block in enumerate(self.h, start=1):
                graph, state = nnx.split(block)
                x_BTD = self._block_function(graph)(state, x_BTD, site(dropout_key, number))
        return self.ln_f(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head, which shares the token embedding's weight."""
        wte_VD = gather(self.wte.weight)[: self.config.vocab_size].astype(x_BTD.dtype)
        return wide_einsum("btd,vd->btv", x_BTD, wte_VD)

    def decode(
        self, tokens_BT: jax.Array, start_B: jax.Array, caches: list[LayerCache]
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Hidden states (B, T, D) of T more tokens, each sequence's first at its own position `start_B`.

        The caches take their keys and values; a sequence may be rewound by giving a smaller start later.
        """
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
        x_BTD = self._embed(tokens_BT, positions_BT)
        grown = []
        for block, cache in zip(self.h, caches, strict=True):
            x_BTD, cache = block(x_BTD, cache=cache, positions_BT=positions_BT)
            grown.append(cache)
        return self.ln_f(x_BTD), grown

    def _embed(self, tokens_BT: jax.Array, positions: jax.Array) -> jax.Array:
        return constrain(self.wte(tokens_BT) + self.wpe(positions), "batch", None, None)

    def _block_function(self, graph: nnx.GraphDef):
        """A block as a pure function of its parameters."""

        def apply(state, x_BTD, key):
            return nnx.merge(graph, state)(x_BTD, key=key)[0]

        return jax.checkpoint(apply) if self.execution.remat else apply

    def _scan_blocks(self, x_BTD: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        graphs, states = zip(*(nnx.split(block) for block in self.h), strict=True)
        apply = self._block_function(graphs[0])

        def step(x_BTD, layer):
            number, state = layer
            return apply(state, x_BTD, site(dropout_key, number)), None

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        numbers = jnp.arange(1, len(states) + 1)
        return jax.lax.scan(step, x_BTD, (numbers, stacked))[0]


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

    def merge(self, params: Mapping[str, jax.Array]) -> GPT2:
        """The model with these parameters; free inside a traced function."""
        flat = [(_path(name), value) for name, value in params.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def initialize(self, key: jax.Array) -> Params:
        """Random parameters: the same for a key on any mesh and in any precision."""
        _, state = nnx.split(GPT2(self.config, self.execution, nnx.Rngs(params=key)))
        return {_name(path): variable[...] for path, variable in nnx.to_flat_state(state)}

    def empty_caches(self, batch: int, places: int) -> list[LayerCache]:
        shape = (batch, self.config.n_head, places, self.config.head_size)
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
    )


def padded_vocab_size(vocab_size: int) -> int:
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _residual_std(config: ModelConfig) -> float:
    # Projections into the residual stream start smaller, so that its variance doesn't grow with depth
    # (Radford et al. 2019, section 2.3).
    return 0.02 / math.sqrt(2 * config.n_layer)


def _write(cache: LayerCache, k_BHTK: jax.Array, v_BHTK: jax.Array, start_B: jax.Array) -> LayerCache:
    def place(cached_HSK, new_HTK, start):
        return jax.lax.dynamic_update_slice(cached_HSK, new_HTK, (0, start, 0))

    return LayerCache(*(jax.vmap(place)(old, new, start_B) for old, new in zip(cache, (k_BHTK, v_BHTK), strict=True)))


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
