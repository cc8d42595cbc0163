"""Check `generation`: the same tokens from both, JAX with its KV cache and PyTorch recomputing every context."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from gpt2_core.sampling import Sampling, fit_context, uniforms
from parity import forward, places
from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject, mismatch, relative_to_largest

LIMIT = 0.0  # tokens that differ: in float64 no two logits are close enough for rounding to choose
LIMIT_LOGITS = 1e-12  # as in `forward`

SETTINGS = {
    "greedy": Sampling(greedy=True),
    "temperature 0.8, top-k 50, top-p 0.9": Sampling(temperature=0.8, top_k=50, top_p=0.9),
    "temperature 1.5, top-p 0.6": Sampling(temperature=1.5, top_p=0.6),
}


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    prompts = prompts_of(subject)
    count = subject.at(24, 96, 128)
    numbers = np.stack([uniforms(subject.seed, i, count) for i in range(len(prompts))])
    for name in subject.at(list(SETTINGS)[:2], SETTINGS):
        a, b = (side.generate(prompts, numbers, SETTINGS[name]) for side in (ours, theirs))
        subject.evidence[f"generation {name}"] = (prompts[-1], a[-1].tolist(), b[-1].tolist())

        def explain(row: int, number: int, sampling: Sampling = SETTINGS[name], tokens: np.ndarray = a) -> str:
            ids = _context(prompts[row], tokens[row, :number], ours.config.block_size)
            return why(ours, theirs, ids, len(prompts[row]), numbers[row, number], sampling)

        yield compare_tokens(f"{name}: {len(prompts)} prompts x {count} tokens", a, b, explain)

    # A batch of prompts of different lengths, against each by itself.
    sampling = SETTINGS["temperature 0.8, top-k 50, top-p 0.9"]
    few = range(0, len(prompts), max(1, len(prompts) // 3))
    alone = np.concatenate([ours.generate([prompts[i]], numbers[i : i + 1, :12], sampling) for i in few])
    together = ours.generate(prompts, numbers[:, :12], sampling)[list(few)]
    yield compare_tokens(
        "JAX: a batch of prompts against one at a time",
        together,
        alone,
        lambda row, number: f"the prompt has {len(prompts[few[row]])} tokens, the batch's longest {len(prompts[-1])}",
    )

    block_size = subject.weights.config.block_size
    tokens_BT = subject.tokens[: 2 * block_size].reshape(2, block_size)
    for pieces in ([block_size], [block_size // 2, *[1] * (block_size - block_size // 2)]):
        yield compare_cache(ours, tokens_BT, pieces)


def compare_cache(ours: JaxSide, tokens_BT: np.ndarray, pieces: list[int]) -> Result:
    """Logits of tokens given to the KV cache in pieces of these lengths, against those without a cache."""
    cached, whole = ours.decoded_logits(tokens_BT, pieces), ours.logits(tokens_BT)
    difference = relative_to_largest(cached, whole)
    where = "" if difference <= LIMIT_LOGITS else _cache_differs(ours, tokens_BT, pieces, cached, whole)
    case = f"JAX: KV cache against recomputation, in {len(pieces)} piece{'s' if len(pieces) > 1 else ''}"
    return Result("generation", case, difference, LIMIT_LOGITS, where)


def compare_tokens(case: str, a: np.ndarray, b: np.ndarray, explain: Callable[[int, int], str]) -> Result:
    """Tokens (prompts, tokens) that differ; `explain` is asked about the first in time, by prompt and number."""
    if a.shape != b.shape:
        return Result("generation", case, math.inf, LIMIT, mismatch(a, b))
    differing = np.argwhere((a != b).T)
    if not len(differing):
        return Result("generation", case, 0.0, LIMIT)
    number, row = differing[0].tolist()
    where = f"first at prompt {row}, token {number}: {a[row, number]} against {b[row, number]}; {explain(row, number)}"
    return Result("generation", case, float(len(differing)), LIMIT, where)


def _context(prompt: list[int], generated: np.ndarray, block_size: int) -> list[int]:
    """What the model sees when it has generated this much."""
    ids = fit_context(prompt, block_size, growing=False)
    for token in generated.tolist():
        ids = fit_context([*ids, token], block_size, growing=True)
    return ids


def why(ours: JaxSide, theirs: TorchSide, ids: list[int], prompt: int, uniform: float, sampling: Sampling) -> str:
    """What of the next token differs: the logits, the sampler, the KV cache, or none of them by itself.

    `ids` is the context, of which the first `prompt` were given.
    """
    tokens_BT = np.array([ids])
    logits = theirs.logits(tokens_BT)
    if not relative_to_largest(ours.logits(tokens_BT), logits) <= LIMIT_LOGITS:
        return f"the logits differ: {forward.compare(ours, theirs, tokens_BT, '').where}"
    a, b = (side.sample(logits[:, -1], np.array([uniform]), sampling).item() for side in (ours, theirs))
    if a != b:
        return (
            f"the samplers differ: from equal logits JAX's takes {a} and PyTorch's {b} at uniform number {uniform:.6f}"
        )
    first = min(prompt, len(ids))
    pieces = [first, *[1] * (len(ids) - first)]
    cached, whole = ours.decoded_logits(tokens_BT, pieces), ours.logits(tokens_BT)
    if not relative_to_largest(cached, whole) <= LIMIT_LOGITS:
        return f"the KV cache differs from recomputation: {_cache_differs(ours, tokens_BT, pieces, cached, whole)}"
    return (
        f"logits, KV cache and samplers agree for this context of {len(ids)} tokens: look at how generation pads "
        "prompts, feeds tokens back, and grows or cuts the context"
    )


def _cache_differs(
    ours: JaxSide, tokens_BT: np.ndarray, pieces: list[int], cached: np.ndarray, whole: np.ndarray
) -> str:
    """The first position whose logits differ, and the first value in order of computation."""
    beyond_T = ~(np.abs(cached - whole).max(axis=(0, 2)) <= LIMIT_LOGITS * np.nanmax(np.abs(whole), initial=0.0))
    decoded, recomputed = ours.decoded_intermediates(tokens_BT, pieces), ours.intermediates(tokens_BT)
    found = places.compare(decoded, {n: recomputed[n] for n in decoded}, sides=("the cache", "recomputation"))
    return f"position {np.argmax(beyond_T)}; {places.first_beyond(found, LIMIT_LOGITS)}"


def prompts_of(subject: Subject) -> list[list[int]]:
    """Pieces of the text of different lengths, so that padding is seen; the longest fills the block."""
    block_size = subject.weights.config.block_size
    count = subject.at(6, 16, 64)
    lengths = np.linspace(1, block_size, count).astype(int)
    starts = np.linspace(0, len(subject.tokens) - block_size - 1, count).astype(int)
    return [subject.tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
