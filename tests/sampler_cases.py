"""The sampler's definition, done slowly with Python's own numbers, and the cases both samplers are held to."""

import itertools

import numpy as np

from gpt2_core.sampling import Sampling

SETTINGS = [
    Sampling(greedy=True),
    *(
        Sampling(temperature=t, top_k=k, top_p=p)
        for t, k, p in itertools.product((0.5, 1.0, 1.7), (None, 1, 3), (None, 0.3, 0.9, 1.0))
    ),
]


def logits_and_uniforms() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    logits = 3 * generator.standard_normal((200, 7))
    logits[::5, 3] = logits[::5, 1]  # ties
    uniforms = generator.random(200)
    uniforms[:3] = 0.0
    uniforms[3:6] = np.nextafter(1.0, 0.0)
    return logits, uniforms


def by_definition(logits: np.ndarray, uniform: float, sampling: Sampling) -> int:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if sampling.greedy:
        return order[0]
    order = order[: sampling.top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p is not None:
        kept = [i for i in range(len(order)) if probabilities[:i].sum() < sampling.top_p]
        probabilities = probabilities[kept] / probabilities[kept].sum()
    total = 0.0
    for token, probability in zip(order, probabilities, strict=False):
        total += probability
        if total > uniform:
            return token
    return order[len(probabilities) - 1]
