"""Check `variants`: every architectural option by itself through `forward` and `gradients`, those of positions through
the KV cache, and all at once through a loss curve. `combinations` has them two by two."""

import dataclasses
import math
from collections.abc import Iterator

from gpt2_core.config import ModelConfig
from parity.engine.adapter import Capability, lacking
from parity.engine.results import Result, Skipped
from parity.gpt2.adapters.protocol import DECODING, GRADIENTS, LOGITS, TRAINING, Adapter
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.checks import forward, generation, gradients
from parity.gpt2.suite import guarded, load

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


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    for name in case.at(["all at once"], OPTIONS):
        weights = random_weights(dataclasses.replace(_BASE, **OPTIONS[name]))
        variant = dataclasses.replace(
            case,
            weights=weights,
            tokens=case.tokens % _BASE.vocab_size,
            steps=case.at(10, 50),
            evidence={},
            part=None,
            level="quick",  # of each check: the breadth is in the options
        )
        adapters = candidate.make(weights), reference.make(weights)
        if case.level == "full":
            parts = {part: load(part) for part in ("forward", "gradients", "loss_curve")}
        else:
            parts = {"forward": guarded("forward", _one_pass)}
            if case.at(False, True):
                parts["gradients"] = guarded("gradients", _one_gradient)
            if name == "all at once":
                # `combinations` trains the others.
                parts["loss_curve"] = load("loss_curve")
            elif "position" in OPTIONS[name]:
                # Decoding counts positions by itself, and few rows of `combinations` decode each kind of them.
                parts["generation"] = guarded("generation", _one_cache)
        for part, run in parts.items():
            if skipped := lacking("variants", f"{name}: {part}", *_asked(part, *adapters)):
                yield skipped
                continue
            results = [result for result in run(variant, *adapters) if isinstance(result, Result)]
            # The first that failed (a NaN is larger than nothing), or the one nearest to its limit.
            worst = max(results, key=lambda r: r.measured / (r.limit or 1.0) if r.passed else math.inf)
            yield Result("variants", f"{name}: {part}, {worst.case}", worst.measured, worst.limit, worst.where)


def _asked(part: str, candidate: Adapter, reference: Adapter) -> list[tuple[Adapter, Capability]]:
    if part == "generation":
        return [(candidate, DECODING)]
    needed = {"forward": LOGITS, "gradients": GRADIENTS, "loss_curve": TRAINING}[part]
    return [(candidate, needed), (reference, needed)]


def _one_pass(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    T = case.weights.config.block_size
    tokens_BT = case.tokens[: 2 * T].reshape(2, T)
    yield forward.compare(candidate, reference, tokens_BT, f"2 x {T} tokens", watched=False)


def _one_cache(case: Case, candidate: Adapter, _: Adapter) -> Iterator[Result]:
    T = case.weights.config.block_size
    tokens_BT = case.tokens[: 2 * T].reshape(2, T)
    yield generation.compare_cache(candidate, tokens_BT, [T // 2, *[1] * (T - T // 2)])


def _one_gradient(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    yield from gradients.compare(candidate, reference, gradients.uneven_batch(case), 4, watched=False)
