"""Check `variants`: every architectural option by itself through `forward` and `gradients`, those of positions through
the KV cache, and all at once through a loss curve. `combinations` has them two by two."""

import dataclasses
import math
from collections.abc import Iterator

from gpt2_core.config import ModelConfig
from parity import forward, generation, gradients
from parity.sides import JaxSide, TorchSide
from parity.subjects import random_weights
from parity.suite import Result, Subject, guarded, load

_BASE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257)
OPTIONS: dict[str, dict] = {
    "rope, half pairs": {"position": "rope"},
    "rope, interleaved pairs": {"position": "rope", "rope_pairs": "interleaved"},
    # Slopes of a power of two of heads, and two beyond it, which no float32 holds exactly.
    "ALiBi, 10 heads": {"position": "alibi", "n_head": 10, "n_embd": 40},
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
            subject,
            weights=weights,
            tokens=subject.tokens % _BASE.vocab_size,
            steps=subject.at(10, 50),
            evidence={},
            level="quick",  # of each check: the breadth is in the options
        )
        if name == "all at once" or subject.level == "full":
            parts = {part: load(part) for part in ("forward", "gradients", "loss_curve")}
        else:
            # `combinations` trains them.
            parts = {"forward": guarded("forward", _one_pass), "gradients": guarded("gradients", _one_gradient)}
            if "position" in OPTIONS[name]:
                # Decoding counts positions by itself, and few rows of `combinations` decode each kind of them.
                parts["generation"] = guarded("generation", _one_cache)
        for part, run in parts.items():
            # The first that failed (a NaN is larger than nothing), or the one nearest to its limit.
            worst = max(run(variant), key=lambda r: r.measured / (r.limit or 1.0) if r.passed else math.inf)
            yield Result("variants", f"{name}: {part}, {worst.case}", worst.measured, worst.limit, worst.where)


def _one_pass(subject: Subject) -> Iterator[Result]:
    T = subject.weights.config.block_size
    tokens_BT = subject.tokens[: 2 * T].reshape(2, T)
    yield forward.compare(JaxSide(subject.weights), TorchSide(subject.weights), tokens_BT, f"2 x {T} tokens")


def _one_cache(subject: Subject) -> Iterator[Result]:
    T = subject.weights.config.block_size
    tokens_BT = subject.tokens[: 2 * T].reshape(2, T)
    yield generation.compare_cache(JaxSide(subject.weights), tokens_BT, [T // 2, *[1] * (T - T // 2)])


def _one_gradient(subject: Subject) -> Iterator[Result]:
    sides = JaxSide(subject.weights), TorchSide(subject.weights)
    yield from gradients.compare(*sides, gradients.uneven_batch(subject), 4, None)
