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
from gpt2_jax.model import Definition, LayerCache, Params, define

# Of a cache, to begin with; it doubles when it is full, and each size is compiled for.
FEWEST_PLACES = 128


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
    def _decoding(self) -> Definition:
        """The model that computes tokens. If weights are narrowed, a tied head is too, and the embeddings aren't."""
        config, execution = self.definition.config, self.definition.execution
        if not self._narrows:
            return self.definition
        return define(dataclasses.replace(config, tie_embeddings=False), execution)

    @property
    def _narrows(self) -> bool:
        return self.definition.execution.param_dtype != jnp.dtype(self.definition.execution.dtype)

    @functools.cached_property
    def _narrowed(self):
        """(params) -> those of `_decoding`: what is multiplied, in the dtype that it is multiplied in, once and not at
        every token. A token reads every weight, and takes as long as that."""

        def narrow(params: Params) -> Params:
            params = {"lm_head.weight": params["wte.weight"]} | params
            matrices = {name for name, axes in self._decoding.logical_axes.items() if len(axes) > 1}
            matrices -= {"wte.weight", "wpe.weight"}
            dtype = self.definition.execution.dtype
            return {name: x.astype(dtype) if name in matrices else x for name, x in params.items()}

        return jax.jit(narrow)

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
            model = self._decoding.merge(params)
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
        params = self._narrowed(params) if self._narrows else params
        contexts = [fit_context(list(prompt), block_size, growing=False) for prompt in prompts]
        caches = tokens_B = None
        for uniforms_B in uniforms.T.astype(dtype):
            if caches is None:
                # Prefill. Its length is rounded up to a power of two, so that few lengths are ever compiled.
                lengths_B = np.array([len(ids) for ids in contexts], np.int32)
                T = min(1 << (int(lengths_B.max()) - 1).bit_length(), block_size)
                tokens_BT = np.zeros((len(contexts), T), np.int32)
                for row, ids in zip(tokens_BT, contexts, strict=True):
                    row[: len(ids)] = ids
                places = max(T, min(FEWEST_PLACES, block_size))
                caches = self.definition.empty_caches(len(contexts), places)
                given = (tokens_BT, np.zeros_like(lengths_B), lengths_B)
            else:
                if lengths_B.max() > places:
                    places = min(2 * places, block_size)
                    caches = _grow(caches, places)
                given = (tokens_B[:, None], lengths_B - 1, np.ones_like(lengths_B))
            before_B = tokens_B
            tokens_B, caches = self._advance(params, caches, *given, uniforms_B, sampling)
            lengths_B = lengths_B + 1
            # A token is fetched when the next one is under way: the device doesn't wait for the host.
            if before_B is not None:
                yield _extend(contexts, before_B)
            if lengths_B.max() > block_size:
                yield _extend(contexts, tokens_B)
                # A window slides: every place holds another position now.
                contexts = [fit_context(ids, block_size, growing=True) for ids in contexts]
                caches = tokens_B = None
        if tokens_B is not None:
            yield _extend(contexts, tokens_B)


@functools.partial(jax.jit, static_argnames="places")
def _grow(caches: list[LayerCache], places: int) -> list[LayerCache]:
    """The caches with room for as many places. A token reads its whole cache, so it is no larger than it need be."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, places - x.shape[2]), (0, 0))), caches)


def _extend(contexts: list[list[int]], tokens_B: jax.Array) -> list[int]:
    """Fetch the tokens, add each to its context, and return them."""
    tokens = np.asarray(tokens_B).tolist()
    for ids, token in zip(contexts, tokens, strict=True):
        ids.append(token)
    return tokens
