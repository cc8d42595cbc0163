"""Check `generation`: the same tokens from both, JAX with its KV cache and PyTorch recomputing every context."""

from collections.abc import Iterator

import numpy as np

from gpt2_core.sampling import Sampling, uniforms
from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject, relative_to_largest

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
        yield _tokens(f"{name}: {len(prompts)} prompts x {count} tokens", a, b)

    # A batch of prompts of different lengths, against each by itself.
    sampling = SETTINGS["temperature 0.8, top-k 50, top-p 0.9"]
    few = range(0, len(prompts), max(1, len(prompts) // 3))
    alone = np.concatenate([ours.generate([prompts[i]], numbers[i : i + 1, :12], sampling) for i in few])
    together = ours.generate(prompts, numbers[:, :12], sampling)[list(few)]
    yield _tokens("JAX: a batch of prompts against one at a time", together, alone)

    block_size = subject.weights.config.block_size
    tokens_BT = subject.tokens[: 2 * block_size].reshape(2, block_size)
    for pieces in ([block_size], [block_size // 2, *[1] * (block_size - block_size // 2)]):
        difference = relative_to_largest(ours.decoded_logits(tokens_BT, pieces), ours.logits(tokens_BT))
        case = f"JAX: KV cache against recomputation, in {len(pieces)} piece{'s' if len(pieces) > 1 else ''}"
        yield Result("generation", case, difference, LIMIT_LOGITS)


def _tokens(case: str, a: np.ndarray, b: np.ndarray) -> Result:
    differing = np.argwhere(a != b)
    where = f"first at prompt {differing[0][0]}, token {differing[0][1]}" if len(differing) else ""
    return Result("generation", case, float(len(differing)), LIMIT, where)


def prompts_of(subject: Subject) -> list[list[int]]:
    """Pieces of the text of different lengths, so that padding is seen; the longest fills the block."""
    block_size = subject.weights.config.block_size
    count = subject.at(6, 16, 64)
    lengths = np.linspace(1, block_size, count).astype(int)
    starts = np.linspace(0, len(subject.tokens) - block_size - 1, count).astype(int)
    return [subject.tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
