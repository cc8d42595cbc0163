"""Check `generation`: the same tokens from both, the candidate with its KV cache and the reference recomputing every
context."""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from gpt2_core.config import ModelConfig
from gpt2_core.sampling import Sampling, fit_context, uniforms
from parity.engine import divergence
from parity.engine.adapter import lacking
from parity.engine.evidence import Texts
from parity.engine.results import Result, Skipped, mismatch, relative_to_largest
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import DECODING, GENERATION, INTERMEDIATES, Adapter
from parity.gpt2.cases import Case, random_weights, tokenizer_of
from parity.gpt2.checks import forward
from parity.gpt2.naming import first_beyond

SETTINGS = {
    "greedy": Sampling(greedy=True),
    "temperature 0.8, top-k 50, top-p 0.9": Sampling(temperature=0.8, top_k=50, top_p=0.9),
    "temperature 1.5, top-p 0.6": Sampling(temperature=1.5, top_p=0.6),
}


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    if skipped := lacking("generation", "generated tokens", (candidate, GENERATION), (reference, GENERATION)):
        yield skipped
    else:
        if case.runs("tokens"):
            yield from _tokens(case, candidate, reference)
        if case.runs("uniform numbers"):
            yield _bfloat16_numbers(case, candidate)
    if not case.runs("KV cache"):
        return
    if skipped := lacking("generation", "KV cache against recomputation", (candidate, DECODING)):
        yield skipped
        return
    block_size = case.weights.config.block_size
    tokens_BT = case.tokens[: 2 * block_size].reshape(2, block_size)
    in_pieces = [block_size // 2, *[1] * (block_size - block_size // 2)]
    for pieces in case.at([in_pieces], [[block_size], in_pieces]):
        yield compare_cache(candidate, tokens_BT, pieces)


def compare_cache(candidate: Adapter, tokens_BT: np.ndarray, pieces: list[int]) -> Result:
    """Logits of tokens given to the KV cache in pieces of these lengths, against those without a cache."""
    cached, whole = candidate.decoded_logits(tokens_BT, pieces), candidate.logits(tokens_BT)
    difference = relative_to_largest(cached, whole)
    where = "" if difference <= limits.FORWARD else _cache_differs(candidate, tokens_BT, pieces, cached, whole)
    number = f"{len(pieces)} piece{'s' if len(pieces) > 1 else ''}"
    title = f"{candidate.name}: KV cache against recomputation, in {number}"
    return Result("generation", title, difference, limits.FORWARD, where)


def _tokens(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    prompts, tokenizer = prompts_of(case), tokenizer_of(case.weights)
    # Briefly: one that fills the block, one after it slid, and two chunks, with no single token after them to compile.
    count = case.at(18, 96, 128)
    numbers, generated = np.stack([uniforms(case.seed, i, count) for i in range(len(prompts))]), {}
    for name in case.at(list(SETTINGS)[:2], SETTINGS):
        a, b = (adapter.generate(prompts, numbers, SETTINGS[name]) for adapter in (candidate, reference))
        generated[name] = a
        texts = (tokenizer.decode(tokens[-1].tolist()) for tokens in (a, b))
        case.evidence[f"generation {name}"] = Texts(tokenizer.decode(prompts[-1])[-60:], *texts)

        def explain(row: int, number: int, sampling: Sampling = SETTINGS[name], tokens: np.ndarray = a) -> str:
            ids = _context(prompts[row], tokens[row, :number], case.weights.config.block_size)
            return why(candidate, reference, ids, len(prompts[row]), numbers[row, number], sampling)

        yield compare_tokens(f"{name}: {len(prompts)} prompts x {count} tokens", a, b, explain)

    if not case.at(False, True):
        return
    # That batch of prompts of different lengths, against some of them by themselves.
    name = "temperature 0.8, top-k 50, top-p 0.9"
    few = list(range(0, len(prompts), len(prompts) // 3))
    alone = [candidate.generate([prompts[i]], numbers[i : i + 1, :12], SETTINGS[name]) for i in few]
    yield compare_tokens(
        f"{candidate.name}: a batch of prompts against one at a time",
        generated[name][few, :12],
        np.concatenate(alone),
        lambda row, number: f"the prompt has {len(prompts[few[row]])} tokens, the batch's longest {len(prompts[-1])}",
    )


def _bfloat16_numbers(case: Case, candidate: Adapter) -> Result:
    """Where all logits are equal, a token is its uniform number times the vocabulary: in bfloat16 too, whose 8 bits
    would never draw most of them."""
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=257, tie_embeddings=False)
    weights = random_weights(config)
    weights.arrays["lm_head.weight"][:] = 0.0
    numbers = np.stack([uniforms(case.seed, row, 12) for row in range(8)])
    with jax.enable_x64(False):
        tokens = candidate.make(weights, "bfloat16").generate([[1]] * len(numbers), numbers, Sampling())
    differing = np.argwhere(tokens != np.floor(numbers * config.vocab_size))
    where = ""
    if len(differing):
        row, number = differing[0]
        where = f"first at {numbers[row, number]:.6f}, which draws token {tokens[row, number]} of {config.vocab_size}"
    title = f"{candidate.name} in bfloat16, equal logits: {numbers.size} uniform numbers"
    return Result("generation", title, float(len(differing)), limits.TOKENS, where)


def compare_tokens(title: str, a: np.ndarray, b: np.ndarray, explain: Callable[[int, int], str]) -> Result:
    """Tokens (prompts, tokens) that differ; `explain` is asked about the first in time, by prompt and number."""
    if a.shape != b.shape:
        return Result("generation", title, math.inf, limits.TOKENS, mismatch(a, b, ("one", "the other")))
    differing = np.argwhere((a != b).T)
    if not len(differing):
        return Result("generation", title, 0.0, limits.TOKENS)
    number, row = differing[0].tolist()
    where = f"first at prompt {row}, token {number}: {a[row, number]} against {b[row, number]}; {explain(row, number)}"
    return Result("generation", title, float(len(differing)), limits.TOKENS, where)


def _context(prompt: list[int], generated: np.ndarray, block_size: int) -> list[int]:
    """What the model sees when it has generated this much."""
    ids = fit_context(prompt, block_size, growing=False)
    for token in generated.tolist():
        ids = fit_context([*ids, token], block_size, growing=True)
    return ids


def why(candidate: Adapter, reference: Adapter, ids: list[int], prompt: int, uniform: float, sampling: Sampling) -> str:
    """What of the next token differs: the logits, the sampler, the KV cache, or none of them by itself.

    `ids` is the context, of which the first `prompt` were given.
    """
    tokens_BT = np.array([ids])
    logits, whole = reference.logits(tokens_BT), candidate.logits(tokens_BT)
    if not relative_to_largest(whole, logits) <= limits.FORWARD:
        return f"the logits differ: {forward.compare(candidate, reference, tokens_BT, '').where}"
    adapters = candidate, reference
    a, b = (adapter.sample(logits[:, -1], np.array([uniform]), sampling).item() for adapter in adapters)
    if a != b:
        return (
            f"the samplers differ: from equal logits {candidate.name}'s takes {a} and {reference.name}'s {b} at "
            f"uniform number {uniform:.6f}"
        )
    if DECODING.of(candidate):
        first = min(prompt, len(ids))
        pieces = [first, *[1] * (len(ids) - first)]
        cached = candidate.decoded_logits(tokens_BT, pieces)
        if not relative_to_largest(cached, whole) <= limits.FORWARD:
            differs = _cache_differs(candidate, tokens_BT, pieces, cached, whole)
            return f"the KV cache differs from recomputation: {differs}"
    return (
        f"logits, KV cache and samplers agree for this context of {len(ids)} tokens: look at how generation pads "
        "prompts, feeds tokens back, and grows or cuts the context"
    )


def _cache_differs(
    candidate: Adapter, tokens_BT: np.ndarray, pieces: list[int], cached: np.ndarray, whole: np.ndarray
) -> str:
    """The first position whose logits differ, and the first value in order of computation."""
    beyond_T = ~(np.abs(cached - whole).max(axis=(0, 2)) <= limits.FORWARD * np.nanmax(np.abs(whole), initial=0.0))
    position = f"position {np.argmax(beyond_T)}"
    if not INTERMEDIATES.of(candidate):
        return position
    decoded = candidate.decoded_intermediates(tokens_BT, pieces)
    recomputed = candidate.intermediates(tokens_BT)
    found = divergence.compare(decoded, {n: recomputed[n] for n in decoded}, ("the cache", "recomputation"))
    return f"{position}; {first_beyond(found, limits.FORWARD)}"


def prompts_of(case: Case) -> list[list[int]]:
    """Pieces of the text of different lengths, so that padding is seen; the longest fills the block."""
    block_size = case.weights.config.block_size
    count = case.at(6, 8, 64)
    lengths = np.linspace(1, block_size, count).astype(int)
    starts = np.linspace(0, len(case.tokens) - block_size - 1, count).astype(int)
    return [case.tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
