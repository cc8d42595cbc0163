"""Check `generation`: the same tokens from both, JAX with its KV cache and PyTorch recomputing every context."""

from collections.abc import Iterator

import numpy as np

from gpt2_core.sampling import Sampling, uniforms
from parity.sides import JaxSide, TorchSide
from parity.suite import Result, Subject

LIMIT = 0.0  # tokens that differ: in float64 no two logits are close enough for rounding to choose


def check(subject: Subject) -> Iterator[Result]:
    ours, theirs = JaxSide(subject.weights), TorchSide(subject.weights)
    prompts = _prompts(subject)
    numbers = np.stack([uniforms(subject.seed, i, subject.new_tokens) for i in range(len(prompts))])
    for name, sampling in (
        ("greedy", Sampling(greedy=True)),
        ("temperature 0.8, top-k 50, top-p 0.9", Sampling(temperature=0.8, top_k=50, top_p=0.9)),
    ):
        a, b = ours.generate(prompts, numbers, sampling), theirs.generate(prompts, numbers, sampling)
        differing = np.argwhere(a != b)
        where = f"first at prompt {differing[0][0]}, token {differing[0][1]}" if len(differing) else ""
        case = f"{name}: {len(prompts)} prompts x {subject.new_tokens} tokens"
        yield Result("generation", case, float(len(differing)), LIMIT, where)


def _prompts(subject: Subject) -> list[list[int]]:
    """Of different lengths, so that padding is seen; the longest fills the block."""
    block_size = subject.weights.config.block_size
    lengths = np.linspace(1, block_size, subject.prompts).astype(int)
    starts = np.linspace(0, len(subject.tokens) - block_size - 1, subject.prompts).astype(int)
    return [subject.tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
