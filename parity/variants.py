"""Check `variants`: every architectural option there is, through `forward`, `gradients` and a loss curve."""

import dataclasses
import math
from collections.abc import Iterator

from gpt2_core.config import ModelConfig
from parity.subjects import random_weights
from parity.suite import Result, Subject, load

_BASE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257)
OPTIONS: dict[str, dict] = {
    "rope, half pairs": {"position": "rope"},
    "rope, interleaved pairs": {"position": "rope", "rope_pairs": "interleaved"},
    "exact GELU": {"mlp": "gelu_exact"},
    "SwiGLU": {"mlp": "swiglu"},
    "SwiGLU, 40 wide": {"mlp": "swiglu", "mlp_width": 40},
    "RMS norm": {"norm": "rmsnorm"},
    "no biases": {"bias": False},
    "untied head": {"tie_embeddings": False},
    "query and key norm": {"qk_norm": True},
    "all at once": {
        "position": "rope",
        "mlp": "swiglu",
        "norm": "rmsnorm",
        "bias": False,
        "tie_embeddings": False,
        "qk_norm": True,
    },
}


def check(subject: Subject) -> Iterator[Result]:
    for name in subject.at(["all at once"], OPTIONS):
        weights = random_weights(dataclasses.replace(_BASE, **OPTIONS[name]))
        variant = dataclasses.replace(
            subject, weights=weights, tokens=subject.tokens % _BASE.vocab_size, steps=subject.at(10, 50), evidence={}
        )
        for part in ("forward", "gradients", "loss_curve"):
            # The quick forms of each: the breadth is in the options.
            results = load(part)(dataclasses.replace(variant, level="quick"))
            # The first that failed (a NaN is larger than nothing), or the one nearest to its limit.
            worst = max(results, key=lambda r: r.measured / (r.limit or 1.0) if r.passed else math.inf)
            case = f"{name}: {worst.check}, {worst.case}"
            yield Result("variants", case, worst.measured, worst.limit, worst.where)
