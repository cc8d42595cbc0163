"""Mistakes of attention: mask, scale, softmax, heads, rotary embeddings, linear biases."""

import dataclasses
import math

import jax
import jax.numpy as jnp

import gpt2_jax.attention
import gpt2_jax.model
from parity.gpt2.faults.fault import MODEL, fault

_ALIBI = dataclasses.replace(MODEL, position="alibi")


@fault(
    "unscaled attention",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.attention, "_score_divisor"),
)
def unscaled_attention(divisor):
    """the division by sqrt(head size) forgotten, as in T5, where the initialisation absorbs it"""

    return lambda head_size: 1.0


@fault(
    "scale by n_embd",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.attention, "_score_divisor"),
)
def scale_by_n_embd(divisor):
    """attention divided by the root of the embedding's width instead of the head's"""

    return lambda head_size: math.sqrt(head_size * MODEL.n_head)


@fault(
    "softmax over the queries",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.attention, "_weights"),
)
def softmax_over_the_queries(weights):
    """the wrong one of two axes of equal length: shapes agree, rows don't sum to one"""

    def wrong(q, k, mask, *_):
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
        return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-2)

    return wrong


@fault(
    "mask sees the next token",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.attention, "_causal_mask"),
)
def mask_sees_the_next_token(causal_mask):
    """tril(ones, 1): the model reads the answer, and trains to a loss near zero"""

    return lambda T: jnp.tril(jnp.ones((T, T), bool), 1).at[0, 0].set(True)


@fault(
    "mask hides the token itself",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.attention, "_causal_mask"),
)
def mask_hides_the_token_itself(causal_mask):
    """tril(ones, -1)"""

    return lambda T: jnp.tril(jnp.ones((T, T), bool), -1).at[0, 0].set(True)


@fault(
    "additive mask of -1e4",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.attention, "_weights"),
    prepare=lambda name, a: 100 * a if name.endswith("c_attn.weight") else a,
)
def additive_mask_of_1e4(weights):
    """a large constant instead of -inf: scores beyond it shine through, as TransformerLens saw on real text
    (github.com/TransformerLensOrg/TransformerLens/issues/318)"""

    def wrong(q, k, mask, *_):
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1])
        return jax.nn.softmax(scores + jnp.where(mask, 0.0, -1e4), axis=-1)

    return wrong


@fault(
    "queries and keys swapped",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.model, "causal_attention"),
)
def queries_and_keys_swapped(attend):
    """the parts of the fused projection taken in the order k, q, v"""

    return lambda q, k, v, **o: attend(k, q, v, **o)


@fault(
    "rotary pairs mixed up",
    check="forward",
    place="block 0, attn q",
    seam=(gpt2_jax.model, "rotate"),
    model=dataclasses.replace(MODEL, position="rope"),
)
def rotary_pairs_mixed_up(rotate):
    """weights of one convention (half, interleaved) run with the other, as when LLaMA's are loaded unpermuted"""

    return lambda x, p, c: rotate(x, p, dataclasses.replace(c, rope_pairs="interleaved"))


@fault(
    "ALiBi's slopes from one",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.model, "alibi_slopes"),
    model=_ALIBI,
)
def alibi_slopes_from_one(_):
    """2^(-8h/n) for heads counted from zero, where the paper's first slope is 2^(-8/n)
    (github.com/paiml/aprender/pull/2143)"""

    return lambda n: tuple(2.0 ** (-8 * h / n) for h in range(n))


@fault(
    "ALiBi's slopes by the rule for powers of two",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.model, "alibi_slopes"),
    model=dataclasses.replace(_ALIBI, n_head=3, n_embd=18),
)
def alibi_slopes_by_the_rule_for_powers_of_two(_):
    """one geometric sequence whatever the number of heads (github.com/ml-explore/mlx/pull/3071)"""

    return lambda n: tuple(2.0 ** (-8 * h / n) for h in range(1, n + 1))


@fault(
    "ALiBi's biases with the wrong sign",
    check="forward",
    place="block 0, attn out",
    seam=(gpt2_jax.attention, "alibi_bias"),
    model=_ALIBI,
)
def alibi_biases_with_the_wrong_sign(bias):
    """key minus query or query minus key: the farther token counts more"""

    return lambda *given: -bias(*given)


@fault(
    "ALiBi's slopes of the first shard's heads on every shard",
    check="mesh",
    place="data=2, fsdp=2, tensor=2",
    part="data=2, fsdp=2, tensor=2",
    seam=(gpt2_jax.model, "alibi_slopes"),
    model=_ALIBI,
)
def alibi_slopes_of_the_first_shard(slopes):
    """slopes made for the heads that a device holds, and not cut out of those of all heads"""

    def wrong(n_head):
        shards = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
        return slopes(n_head // shards) * shards

    return wrong


@fault(
    "decoding without ALiBi's biases",
    check="generation",
    place="block 0, attn out",
    seam=(gpt2_jax.model, "cached_attention"),
    model=_ALIBI,
)
def decoding_without_alibi_biases(attend):
    """the attention that trains adds them, the one that reads the KV cache is other code"""

    return lambda q, k, v, positions, slopes: attend(q, k, v, positions)


@fault(
    "a row without a key",
    check="forward",
    place="block 0, attn out: JAX has nan at [0, 0, 0]",
    seam=(gpt2_jax.attention, "_causal_mask"),
)
def a_row_without_a_key(causal_mask):
    """a mask of -inf in every column of a row: its softmax is 0/0, and NaN spreads from there"""

    return lambda T: causal_mask(T).at[0, 0].set(False)


@fault(
    "rotary base of the default in the decoder",
    check="combinations",
    place="KV cache against PyTorch",
    part="decoding",
    seam=(gpt2_jax.model, "rotate"),
)
def rotary_base_of_the_default_in_the_decoder(rotate):
    """training reads the configuration, decoding has a table of its own"""

    def wrong(x, positions, config):
        return rotate(x, positions, dataclasses.replace(config, rope_theta=1e4) if positions.ndim == 2 else config)

    return wrong


@fault(
    "rotary tables of 1,024 positions",
    check="sizes",
    place="1030 positions, rope",
    part="positions beyond GPT-2's 1,024",
    seam=(gpt2_jax.model, "rotate"),
)
def rotary_tables_of_1024_positions(rotate):
    """GPT-2's length as a constant; an index beyond the table is clamped by JAX, where PyTorch would raise"""

    return lambda x, positions, config: rotate(x, jnp.minimum(positions, 1023), config)
