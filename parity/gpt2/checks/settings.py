"""Check `settings`: every numeric setting of the model and the optimizer at a value that isn't its default.

A program that ignores a setting, and has its default written into the code, agrees wherever the default is asked for.
Here no setting has its default, and each value is far enough from it that ignoring it shows.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from gpt2_core.config import PRESETS, ModelConfig, OptimizerConfig, TrainConfig
from parity.engine.adapter import lacking
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import DROPOUT, GIVEN_MASKS, TRAINING, Adapter
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.checks.combinations import explained, first_difference, uneven_batch

STEPS = 4

# An odd number of heads, widths that are no powers of two, a vocabulary that is no multiple of 128; between them the
# two have every number of the configuration at a value that isn't its default.
_SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 18, "block_size": 20, "vocab_size": 300}
CASES = {
    "layer norm, warmup, clipping": (
        ModelConfig(**_SIZES, layer_norm_epsilon=0.03, mlp_width=44, dropout=0.35),
        OptimizerConfig(
            learning_rate=2e-3,
            final_fraction=0.4,
            warmup_steps=2,
            weight_decay=0.3,
            beta1=0.7,
            beta2=0.8,
            epsilon=0.01,
            clip_norm=0.2,
        ),
    ),
    "rotary, RMS norm, no warmup, no clipping": (
        ModelConfig(
            **_SIZES,
            position="rope",
            rope_theta=50.0,
            norm="rmsnorm",
            qk_norm=True,
            layer_norm_epsilon=0.2,
            mlp="swiglu",
            mlp_width=28,
        ),
        OptimizerConfig(
            learning_rate=1e-3,
            final_fraction=0.7,
            warmup_steps=0,
            weight_decay=0.0,
            beta1=0.0,
            beta2=0.5,
            epsilon=0.1,
            clip_norm=0.0,
        ),
    ),
}


# Parameters of the published models (Radford et al. 2019, table 2, without counting the tied head twice).
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    yield _derived()
    for name in filter(case.runs, case.at(list(CASES)[:1], CASES, prove=CASES)):
        model, _ = CASES[name]
        asked = [(candidate, TRAINING), (reference, TRAINING)]
        asked += [(candidate, DROPOUT), (reference, GIVEN_MASKS)] if model.dropout > 0 else []
        if skipped := lacking("settings", name, *asked):
            yield skipped
        else:
            yield from _case(case, candidate, reference, name)


def _derived() -> Result:
    """What follows from the settings, the same for both sides: sizes of the published models, widths of the MLP."""
    wrong = [
        f"{name} has {count:,} parameters, where {PUBLISHED[name]:,} are due"
        for name, sizes in PRESETS.items()
        if (count := ModelConfig(**sizes).parameter_count) != PUBLISHED[name]
    ]
    for n_embd in range(8, 1601, 8):
        # The least multiple of 64 from 8/3 of the width on: three matrices with about the weights of two.
        gated = next(width for width in itertools.count(64, 64) if 3 * width >= 8 * n_embd)
        for mlp, due in (("swiglu", gated), ("gelu_tanh", 4 * n_embd), ("gelu_exact", 4 * n_embd)):
            if (width := ModelConfig(n_embd=n_embd, n_head=1, mlp=mlp).mlp_size) != due:
                wrong.append(f"{mlp} at n_embd {n_embd} is {width} wide, where {due} is due")
    title = f"parameters of {len(PUBLISHED)} published models, default widths of the MLP"
    return Result("settings", title, float(len(wrong)), limits.NONE, wrong[0] if wrong else "")


def config_of(model: ModelConfig, optimizer: OptimizerConfig) -> TrainConfig:
    return TrainConfig(model=model, optimizer=optimizer, steps=STEPS, batch_size=8, precision="float64", mesh=1)


def off_default(config: ModelConfig | OptimizerConfig) -> dict[str, float]:
    """The numeric settings of a configuration that don't have their default, by name."""
    values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    return {n: v for n, (v, default) in values.items() if v != default and type(v) in (int, float)}


def _case(case: Case, candidate: Adapter, reference: Adapter, name: str) -> Iterator[Result]:
    model, optimizer = CASES[name]
    config = config_of(model, optimizer)
    weights = random_weights(dataclasses.replace(model, dropout=0.0), seed=case.seed, dtype=np.float64)
    batches = [uneven_batch(case, model, step) for step in range(STEPS)]
    ours, theirs = candidate.make(weights), reference.make(weights)
    masks = ours.dropout_masks(config, batches).steps if model.dropout > 0 else None
    a = ours.train(config, batches)
    b = theirs.train(config, batches) if masks is None else theirs.train_with_masks(config, batches, masks)
    measured, where = first_difference(a, b, limits.STEP)
    if not measured <= limits.STEP:
        where += explained(case, ours, theirs)
    said = ", ".join(f"{n} {v}" for part in (model, optimizer) for n, v in off_default(part).items())
    yield Result("settings", f"{name}: {STEPS} steps with {said}", measured, limits.STEP, where)
    if masks is not None:
        # Both have the candidate's masks: whether they drop what they should is counted.
        drawn = [mask for step in masks for part in step for site in part for mask in site]
        due, total, kept = 1 - model.dropout, sum(m.size for m in drawn), sum(int(m.sum()) for m in drawn)
        z = (kept - total * due) / math.sqrt(total * due * (1 - due))
        p = max(math.erfc(abs(z) / math.sqrt(2)), 1e-300)
        where = f"{kept / total:.5f} where {due} is due"
        title = f"{name}: share kept at dropout {model.dropout}"
        yield Result("settings", title, -math.log10(p), limits.SURPRISE, where)
