"""Generation with a KV cache: a compiled prefill, then a decoding loop that runs on the device, a chunk at a time.

Shapes: B batch, T prompt (padded), N tokens of a chunk, S slots of the cache, D embedding, V vocabulary. The sampler's
definition is in gpt2_core.sampling.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_core.sampling import Sampling, fit_context
from gpt2_jax.definition import Definition, Params, define
from gpt2_jax.model import LayerCache

# Initial number of slots of a cache. It doubles when it is full; each size is compiled once.
MIN_SLOTS = 128
# Tokens decoded in one call. If fewer are left they are decoded one by one, because each length is compiled.
CHUNK = 8


def sample(logits_BV: jax.Array, uniforms_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Next tokens (B,), int32, from the last position's logits and one uniform number for each sequence."""
    if sampling.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    kept_BV, order_BV = _largest(logits_BV / sampling.temperature, sampling.top_k)
    probabilities_BV = jax.nn.softmax(kept_BV, axis=-1)
    if sampling.top_p is not None:
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        probabilities_BV = jnp.where(before_BV < sampling.top_p, probabilities_BV, 0.0)
    cumulative_BV = jnp.cumsum(probabilities_BV, axis=-1)
    exceeds_BV = cumulative_BV > uniforms_B[:, None] * cumulative_BV[:, -1:]
    # Rounding must not move the choice past the last token that was kept.
    last_kept_B = jnp.sum(probabilities_BV > 0, axis=-1) - 1
    first_B = jnp.where(exceeds_BV.any(axis=-1), jnp.argmax(exceeds_BV, axis=-1), last_kept_B)
    chosen_B = jnp.minimum(first_B, last_kept_B)
    return jnp.take_along_axis(order_BV, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _largest(logits_BV: jax.Array, count: int | None) -> tuple[jax.Array, jax.Array]:
    """The `count` largest logits (None: all) in descending order, equal ones by token id; and their token ids."""
    if count is None:
        order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
        return jnp.take_along_axis(logits_BV, order_BV, axis=-1), order_BV
    # top_k doesn't sort what it drops. It ranks 0.0 above -0.0, which are equal here.
    return jax.lax.top_k(jnp.where(logits_BV == 0, 0, logits_BV), min(count, logits_BV.shape[-1]))


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
        """(params) -> those of `_decoding` as a token reads them, made once and not for every token, which reads every
        weight and takes as long as that: what is multiplied is in the dtype that it is multiplied in, and a linear
        layer's weight has its input axis last."""

        def narrow(params: Params) -> Params:
            params = {"lm_head.weight": params["wte.weight"]} | params
            dtype = self.definition.execution.dtype
            params = {name: x.astype(dtype) if name in self._decoding.narrow else x for name, x in params.items()}
            # XLA computes a vector times a matrix as a multiplication and a sum: on GPUs one kernel if the summed axis
            # is contiguous; if not, it writes all products to memory and reads them back, three times the bytes.
            return _move_inputs(params, 0, -1)

        return jax.jit(narrow)

    def _next(
        self,
        params: Params,
        caches: list[LayerCache],
        tokens_BT: jax.Array,
        start_B: jax.Array,
        last_B: jax.Array,
        ended_B: jax.Array,
        uniforms_B: jax.Array,
        sampling: Sampling,
        end_of_text: int | None,
    ) -> tuple[list[LayerCache], jax.Array, jax.Array]:
        """Caches, the tokens (B,) that follow column `last_B` of `tokens_BT`, whose first column is at position
        `start_B`, and which sequences have ended with them (B,)."""
        if self._narrows:
            params = _move_inputs(params, -1, 0)
        model = self._decoding.merge(params)
        x_BTD, caches = model.decode(tokens_BT, start_B, caches)
        last_B1D = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
        tokens_B = sample(model.logits(last_B1D)[:, 0], uniforms_B, sampling)
        return caches, tokens_B, ended_B if end_of_text is None else ended_B | (tokens_B == end_of_text)

    @functools.cached_property
    def _prefill(self):
        """(params, tokens_BT, lengths_B, ended_B, uniforms_B, slots, sampling, end_of_text) -> as of `_next`."""

        def prefill(
            params: Params,
            tokens_BT: jax.Array,
            lengths_B: jax.Array,
            ended_B: jax.Array,
            uniforms_B: jax.Array,
            slots: int,
            sampling: Sampling,
            end_of_text: int | None,
        ):
            caches = self.definition.empty_caches(len(tokens_BT), slots)
            given = (tokens_BT, jnp.zeros_like(lengths_B), lengths_B - 1, ended_B, uniforms_B)
            return self._next(params, caches, *given, sampling, end_of_text)

        return jax.jit(prefill, static_argnames=("slots", "sampling", "end_of_text"))

    @functools.cached_property
    def _decode(self):
        """(params, caches, tokens_B, ended_B, lengths_B, uniforms_NB, sampling, end_of_text) -> caches, tokens_B and
        ended_B as they are then, and all tokens (N, B).

        `lengths_B` counts `tokens_B`, the last of each sequence. The loop ends early when every sequence has ended;
        the rows of what it didn't compute are zeros. Without an `end_of_text` its number of turns is known to the
        compiler, and a GPU then runs it without asking the host after each.
        """

        def decode(
            params: Params,
            caches: list[LayerCache],
            tokens_B: jax.Array,
            ended_B: jax.Array,
            lengths_B: jax.Array,
            uniforms_NB: jax.Array,
            sampling: Sampling,
            end_of_text: int | None,
        ):
            def goes_on(state):
                n, _, _, ended_B, _ = state
                more = n < len(uniforms_NB)
                return more if end_of_text is None else more & ~ended_B.all()

            def step(state):
                n, caches, tokens_B, ended_B, tokens_NB = state
                given = (tokens_B[:, None], lengths_B - 1 + n, jnp.zeros_like(lengths_B), ended_B, uniforms_NB[n])
                caches, tokens_B, ended_B = self._next(params, caches, *given, sampling, end_of_text)
                return n + 1, caches, tokens_B, ended_B, tokens_NB.at[n].set(tokens_B)

            state = (jnp.int32(0), caches, tokens_B, ended_B, jnp.zeros(uniforms_NB.shape, jnp.int32))
            return jax.lax.while_loop(goes_on, step, state)[1:]

        return jax.jit(decode, static_argnames=("sampling", "end_of_text"), donate_argnames="caches")

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        uniforms: np.ndarray,
        sampling: Sampling,
        end_of_text: int | None = None,
    ) -> Iterator[list[int]]:
        """Yield the next token of each prompt, as many times as `uniforms` (B, tokens) has columns; given an
        `end_of_text`, no longer than until each prompt's continuation has had that token.

        Prompts may differ in length: each is padded at its end, and its padding is overwritten in the cache by what is
        generated before anything can see it.
        """
        block_size = self.definition.config.block_size
        params = self._narrowed(params) if self._narrows else params
        contexts = [fit_context(list(prompt), block_size, growing=False) for prompt in prompts]
        uniforms_NB = uniforms.T.astype(jnp.promote_types(self.definition.execution.dtype, jnp.float32))
        ended_B = np.zeros(len(contexts), bool)
        while len(uniforms_NB):
            count = min(len(uniforms_NB), block_size - max(map(len, contexts)) + 1)
            chunks = self._window(params, contexts, ended_B, uniforms_NB[:count], sampling, end_of_text)
            for chunk in _one_ahead(chunks):
                for tokens in np.asarray(chunk).reshape(-1, len(contexts)).tolist():
                    for ids, token in zip(contexts, tokens, strict=True):
                        ids.append(token)
                    yield tokens
                    ended_B = ended_B | [token == end_of_text for token in tokens]
                    if ended_B.all():
                        return
            uniforms_NB = uniforms_NB[count:]
            # The window slides: every slot holds another position now.
            contexts = [fit_context(ids, block_size, growing=True) for ids in contexts]

    def _window(
        self,
        params: Params,
        contexts: list[list[int]],
        ended_B: np.ndarray,
        uniforms_NB: np.ndarray,
        sampling: Sampling,
        end_of_text: int | None,
    ) -> Iterator[jax.Array]:
        """Dispatch what continues the contexts by a token for each row of `uniforms_NB`, as long as the block holds
        them all: yields the tokens of the prefill (B,), then of each chunk (N, B), still being computed."""
        block_size = self.definition.config.block_size
        lengths_B = np.array([len(ids) for ids in contexts], np.int32)
        # The prompts' length is rounded up to a power of two, so that few lengths are ever compiled.
        T = min(1 << (int(lengths_B.max()) - 1).bit_length(), block_size)
        tokens_BT = np.zeros((len(contexts), T), np.int32)
        for row, ids in zip(tokens_BT, contexts, strict=True):
            row[: len(ids)] = ids
        slots = max(T, min(MIN_SLOTS, block_size))
        static = {"sampling": sampling, "end_of_text": end_of_text}
        caches, tokens_B, ended_B = self._prefill(
            params, tokens_BT, lengths_B, ended_B, uniforms_NB[0], slots=slots, **static
        )
        yield tokens_B
        done = 1
        while done < len(uniforms_NB):
            N = CHUNK if len(uniforms_NB) - done >= CHUNK else 1
            needed = lengths_B.max() + done + N - 1
            if needed > slots:
                while needed > slots:
                    slots = min(2 * slots, block_size)
                caches = _grow(caches, slots)
            numbers_NB = uniforms_NB[done : done + N]
            caches, tokens_B, ended_B, tokens_NB = self._decode(
                params, caches, tokens_B, ended_B, lengths_B + done, numbers_NB, **static
            )
            yield tokens_NB
            done += N


def _move_inputs(params: Params, source: int, destination: int) -> Params:
    """The parameters with the input axis of each linear layer's weight moved."""
    linear = {n for n, x in params.items() if n.startswith("h.") and n.endswith(".weight") and x.ndim > 1}
    return {n: jnp.moveaxis(x, source, destination) if n in linear else x for n, x in params.items()}


def _one_ahead(chunks: Iterable[jax.Array]) -> Iterator[jax.Array]:
    """Each chunk after the next is dispatched, so that the device doesn't wait while the host fetches."""
    before = None
    for chunk in chunks:
        if before is not None:
            yield before
        before = chunk
    if before is not None:
        yield before


@functools.partial(jax.jit, static_argnames="slots")
def _grow(caches: list[LayerCache], slots: int) -> list[LayerCache]:
    """The caches with that many slots. A token reads its whole cache, so it is no larger than it need be."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), caches)
