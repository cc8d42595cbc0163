"""Generation with a KV cache: one compiled prefill, one compiled step a token.

Shapes: B batch, T prompt (padded), S places of the cache, D embedding, V vocabulary. The sampler's definition is in
gpt2_core.sampling.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_core.sampling import Sampling, fit_context
from gpt2_jax.model import Definition, LayerCache, Params


def sample(logits_BV: jax.Array, uniforms_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Next tokens (B,), int32, from the last position's logits and one uniform number for each sequence."""
    if sampling.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        order_BV = order_BV[:, : sampling.top_k]
    kept_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    probabilities_BV = jax.nn.softmax(kept_BV, axis=-1)
    if sampling.top_p is not None:
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        probabilities_BV = jnp.where(before_BV < sampling.top_p, probabilities_BV, 0.0)
    cumulative_BV = jnp.cumsum(probabilities_BV, axis=-1)
    exceeds_BV = cumulative_BV > uniforms_B[:, None] * cumulative_BV[:, -1:]
    # Rounding must not push the choice past the last token that was kept.
    last_kept_B = jnp.sum(probabilities_BV > 0, axis=-1) - 1
    first_B = jnp.where(exceeds_BV.any(axis=-1), jnp.argmax(exceeds_BV, axis=-1), last_kept_B)
    chosen_B = jnp.minimum(first_B, last_kept_B)
    return jnp.take_along_axis(order_BV, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Generator:
    """The compiled functions of one model; make it once and use it for any number of prompts."""

    definition: Definition

    @functools.cached_property
    def _advance(self):
        """(params, caches, tokens_BT, start_B, lengths_B, uniforms_B, sampling) -> next tokens, caches."""

        def advance(
            params: Params,
            caches: list[LayerCache],
            tokens_BT: jax.Array,
            start_B: jax.Array,
            lengths_B: jax.Array,
            uniforms_B: jax.Array,
            sampling: Sampling,
        ):
            model = self.definition.merge(params)
            x_BTD, caches = model.decode(tokens_BT, start_B, caches)
            last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
            return sample(model.logits(last_B1D)[:, 0], uniforms_B, sampling), caches

        return jax.jit(advance, static_argnames="sampling", donate_argnums=1)

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling
    ) -> Iterator[list[int]]:
        """Yield the next token of each prompt, as many times as `uniforms` (B, tokens) has columns.

        Prompts may differ in length: each is padded at its end, and its padding is overwritten in the cache by what is
        generated before anything can see it.
        """
        block_size = self.definition.config.block_size
        dtype = jnp.promote_types(self.definition.execution.dtype, jnp.float32)
        contexts = [fit_context(list(prompt), block_size, growing=False) for prompt in prompts]
        caches = None
        for step in range(uniforms.shape[1]):
            uniforms_B = jnp.asarray(uniforms[:, step], dtype)
            if caches is None:
                # Prefill. Its length is rounded up to a power of two, so that few lengths are ever compiled.
                longest = max(map(len, contexts))
                T = min(1 << (longest - 1).bit_length(), block_size)
                tokens_BT = np.zeros((len(contexts), T), np.int32)
                for row, ids in zip(tokens_BT, contexts, strict=True):
                    row[: len(ids)] = ids
                start_B = np.zeros(len(contexts), np.int32)
                lengths_B = np.array([len(ids) for ids in contexts], np.int32)
                caches = self.definition.empty_caches(len(contexts), block_size)
            else:
                tokens_BT = np.array([[ids[-1]] for ids in contexts], np.int32)
                start_B = np.array([len(ids) - 1 for ids in contexts], np.int32)
                lengths_B = np.ones(len(contexts), np.int32)
            tokens_B, caches = self._advance(params, caches, tokens_BT, start_B, lengths_B, uniforms_B, sampling)
            tokens = np.asarray(tokens_B).tolist()
            yield tokens
            grown = [[*ids, token] for ids, token in zip(contexts, tokens, strict=True)]
            contexts = [fit_context(ids, block_size, growing=True) for ids in grown]
            if any(len(ids) < len(long) for ids, long in zip(contexts, grown, strict=True)):
                caches = None  # a window has slid: every place holds another position now
