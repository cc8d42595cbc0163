"""Mistakes of generation: KV cache, filters, the choice among equals."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

import gpt2_jax.generate
import gpt2_jax.model
from parity.gpt2.faults.fault import fault


def _filtering(sample: Callable, mistake: str) -> Callable:
    """A sampler that filters with one of three mistakes."""

    def wrong(logits, uniforms, sampling):
        if sampling.greedy:
            return sample(logits, uniforms, sampling)
        tempered = logits / sampling.temperature
        ranked = logits if mistake == "temperature last" else tempered
        order = jnp.argsort(ranked, axis=-1, descending=True, stable=True)
        by_rank = jnp.take_along_axis(ranked, order, axis=-1)
        place = jnp.arange(order.shape[-1])
        top_k = sampling.top_k or order.shape[-1]
        # Filtering to zero instead of -inf leaves the filtered tokens a share of the probability.
        by_rank = jnp.where(place < top_k, by_rank, 0.0 if mistake == "leak" else -jnp.inf)
        p = jax.nn.softmax(by_rank, axis=-1)
        if sampling.top_p is not None:
            cumulative = jnp.cumsum(p, axis=-1)
            edge = cumulative if mistake == "crossing" else cumulative - p
            keep = (edge < sampling.top_p) | (place == 0)
            p = jnp.where(keep, p, 0.0)
        if mistake == "temperature last":
            p = jnp.where(p > 0, p ** (1 / sampling.temperature), 0.0)
        cumulative = jnp.cumsum(p, axis=-1)
        chosen = jnp.argmax(cumulative > uniforms[:, None] * cumulative[:, -1:], axis=-1)
        return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return wrong


@fault(
    "KV cache off by one",
    check="generation",
    place="KV cache",
    seam=(gpt2_jax.model, "_write"),
)
def kv_cache_off_by_one(write):
    """a new token's keys are written one place too far"""

    return lambda cache, k, v, start: write(cache, k, v, start + 1)


@fault(
    "stale KV cache",
    check="generation",
    place="KV cache",
    seam=(gpt2_jax.model, "_write"),
)
def stale_kv_cache(write):
    """the cache of the prefill is read for ever"""

    return lambda cache, k, v, start: cache if k.shape[2] == 1 else write(cache, k, v, start)


@fault(
    "top-p without the crossing token",
    check="generation",
    place="top-p 0.9",
    seam=(gpt2_jax.generate, "sample"),
)
def top_p_without_the_crossing_token(sample):
    """what is kept is where cumulative < p, not where what precedes is < p"""

    return _filtering(sample, "crossing")


@fault(
    "temperature after the filters",
    check="generation",
    place="top-p 0.9",
    seam=(gpt2_jax.generate, "sample"),
)
def temperature_after_the_filters(sample):
    """top-p sees the untempered distribution"""

    return _filtering(sample, "temperature last")


@fault(
    "filtered tokens leak",
    check="generation",
    place="top-k 50",
    seam=(gpt2_jax.generate, "sample"),
)
def filtered_tokens_leak(sample):
    """logits set to zero, not to -inf, by top-k"""

    return _filtering(sample, "leak")


@fault(
    "KV cache grown empty",
    check="sizes",
    place="a cache that grows",
    part="generation",
    seam=(gpt2_jax.generate, "_grow"),
)
def kv_cache_grown_empty(grow):
    """a larger cache is allocated, and what was in the smaller isn't copied"""

    return lambda caches, slots: jax.tree.map(jnp.zeros_like, grow(caches, slots))


@fault(
    "the last of equal logits",
    check="sizes",
    place="equal logits, greedy",
    part="sampling",
    seam=(gpt2_jax.generate, "sample"),
)
def the_last_of_equal_logits(sample):
    """numpy's argsort read from its end, where argmax takes the first"""

    def wrong(logits, uniforms, sampling):
        if sampling.greedy:
            return logits.shape[-1] - 1 - sample(logits[:, ::-1], uniforms, sampling)
        return sample(logits, uniforms, sampling)

    return wrong


@fault(
    "uniform numbers in bfloat16",
    check="generation",
    place="equal logits: 96 uniform numbers",
    part="uniform numbers",
    seam=(gpt2_jax.generate.Generator, "__call__"),
)
def uniform_numbers_in_bfloat16(call):
    """cast as everything else is: 8 bits, and most tokens of a large vocabulary are never drawn"""

    def wrong(self, params, prompts, uniforms, *arguments, **options):
        rounded = uniforms.astype(jnp.dtype(self.definition.execution.dtype)).astype(uniforms.dtype)
        return call(self, params, prompts, rounded, *arguments, **options)

    return wrong
