"""Check `dropout`: the masks that each implementation draws, and training with them, the reference given those that the
candidate drew.

What masks are like is a matter of their shapes and not of the weights: they are looked at on a small model with the
options of the one compared, whose lengths are no multiples of what masks are packed in. The masks that the train step
uses are those looked at, because the reference, given them, trains the same. cuDNN's attention has no dropout here
(see gpt2_jax.attention), so there are no masks that can't be seen.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import scipy.special

from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.data.batches import Batch, TrainingBatches
from parity.engine import divergence
from parity.engine.adapter import lacking
from parity.engine.independence import Displaceable, aligned, displaced, first_surprise, two_sided
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import (
    DROPOUT,
    DROPPED_INTERMEDIATES,
    GIVEN_MASKS,
    MESH,
    PLAIN_LOGITS,
    SEEDS,
    TRAINING,
    Adapter,
    Masks,
    Sites,
    Trained,
)
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.naming import first_beyond, in_words

# Neither is GPT-2's 0.1, and neither is 1 minus itself. The statistics of pairs are taken at the first, where products
# of masks are nearly symmetric; they see a correlation of 0.1 in any two masks. The second is small: shares have little
# variance then, and a rate that is rounded to 8 bits shows.
RATES = (0.4, 0.006)
STEPS_LOOKED_AT = 3
# What is drawn doesn't depend on how it is computed. Each at one of the rates.
MODES = {
    "xla attention": {"attention": "xla"},
    "recompute attention, data=2, fsdp=2, tensor=2": {"attention": "recompute", "mesh": "data=2,fsdp=2,tensor=2"},
    "scan, remat, data=2": {"attention": "xla", "mesh": "data=2", "scan_layers": True, "remat": True},
}


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 36, "block_size": 68, "mlp_width": None}
    plain = dataclasses.replace(case.weights.config, dropout=0.0, **shape)
    weights = random_weights(plain)
    steps = 5
    stream = TrainingBatches(case.tokens, sequence_length=plain.block_size, batch_size=8, seed=case.seed)
    batches = [stream[step] for step in range(steps)]
    ours, theirs = candidate.make(weights), reference.make(weights)

    if case.runs("evaluation"):
        # Where no key is given, as in evaluation and generation, nothing is dropped.
        dropping = dataclasses.replace(weights, config=dataclasses.replace(plain, dropout=RATES[0]))
        for undropped in (theirs, ours):
            a, b = (_logits(adapter, batches[0].inputs[:1]) for adapter in (undropped.make(dropping), undropped))
            title = f"{undropped.name}: evaluation drops nothing"
            yield Result("dropout", title, float(np.abs(a - b).max()), limits.NONE)

    for adapter in (ours, theirs):
        if SEEDS.of(adapter) and case.runs("seeds"):
            yield _seeds(adapter, case.seed)

    for number, rate in enumerate(case.at(RATES[:1], RATES, prove=RATES)):
        looked_at, trained_with = (case.runs(f"{part} at rate {rate}") for part in ("masks", "training"))
        if not (looked_at or trained_with):
            continue
        config = _config(plain, rate, steps, case.seed)
        of_adapters: dict[Adapter, Masks] = {}
        for adapter in (ours, theirs):
            if skipped := lacking("dropout", f"masks at rate {rate}", (adapter, DROPOUT)):
                yield skipped
                continue
            # Those that are trained with, of the candidate; otherwise those that are looked at.
            drawn = adapter.dropout_masks(config, batches if adapter is ours else batches[:STEPS_LOOKED_AT])
            placed = _sites(adapter.name, drawn.steps, config)
            if looked_at:
                yield placed
            if placed.passed:  # otherwise there is no telling whose mask is whose
                of_adapters[adapter] = drawn
        if looked_at:
            yield from _scales_and_shares(of_adapters, config)
        if looked_at and number == 0:
            precisions = case.at((), ("float32", "bfloat16"), prove=("bfloat16",))
            if precisions and ours in of_adapters:
                yield _in_other_precisions(ours, config, batches[0], of_adapters[ours].steps[0], precisions)
            other = dataclasses.replace(config, seed=config.seed + 1)
            for adapter, drawn in of_adapters.items():
                of_seeds = [*drawn.steps[:STEPS_LOOKED_AT], *adapter.dropout_masks(other, batches[:1]).steps]
                yield from _independence(adapter.name, of_seeds, config)
        if len(of_adapters) < 2 or not trained_with:
            continue
        if skipped := lacking("dropout", f"training at rate {rate}", (ours, TRAINING), (theirs, GIVEN_MASKS)):
            yield skipped
            continue
        modes = case.at(list(MODES)[:1], list(MODES))[number :: len(RATES)]
        masks = of_adapters[ours].steps
        b = theirs.train_with_masks(config, batches, masks) if modes else None
        for mode in modes:
            yield _trained(ours, theirs, config, mode, batches, masks, b)


def _seeds(adapter: Adapter, seed: int) -> Result:
    """No two of a run's steps and processes, nor of the next seed's, draw the same masks."""
    steps, processes = 50, 4
    places: dict[int, list[str]] = {}
    for s in (seed, seed + 1):
        for (step, process), drawn in adapter.dropout_seeds(s, steps, processes).items():
            places.setdefault(drawn, []).append(f"step {step} of process {process}, seed {s}")
    repeated = [found for found in places.values() if len(found) > 1]
    title = f"{adapter.name}: seeds that two of {steps} steps of {processes} processes share"
    return Result("dropout", title, float(len(repeated)), limits.NONE, " and ".join(repeated[0]) if repeated else "")


def _logits(adapter: Adapter, tokens_BT: np.ndarray) -> np.ndarray:
    return adapter.plain_logits(tokens_BT) if PLAIN_LOGITS.of(adapter) else adapter.logits(tokens_BT)


def _trained(
    candidate: Adapter,
    reference: Adapter,
    config: TrainConfig,
    mode: str,
    batches: Sequence[Batch],
    masks: list[list[Sites]],
    expected: Trained,
) -> Result | Skipped:
    """The candidate trained in a way of executing it, against the reference with the masks that the candidate draws."""
    executed = dataclasses.replace(config, **MODES[mode])
    if executed.mesh != 1:
        if skipped := lacking("dropout", mode, (candidate, MESH)):
            return skipped
        if candidate.devices_of(executed.mesh) > candidate.devices():
            return Skipped("dropout", f"{mode}: there are {candidate.devices()} devices")
    measured, where = _first_difference(candidate.train(executed, batches), expected)
    if not measured <= limits.CURVE and DROPPED_INTERMEDIATES.of(candidate):
        where += _first_value(candidate, reference, config, batches[0], masks[0])
    rate = config.model.dropout
    title = f"{len(batches)} steps at rate {rate}, {mode}, {reference.name} given {candidate.name}'s masks"
    return Result("dropout", title, measured, limits.CURVE, where)


def _config(model: ModelConfig, rate: float, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(model, dropout=rate),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2),
        steps=steps,
        batch_size=8,
        accumulation=2,
        precision="float64",
        mesh=1,
        seed=seed,
    )


def expected_sites(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Where GPT-2 drops out (Radford et al. 2019's published code: embd, attn and resid), in order of computation, and
    the shapes of the masks of a part."""
    model, B = config.model, config.microbatch_size
    rows = (B, model.block_size, model.n_embd)
    weights = (B, model.n_head, model.block_size, model.block_size)
    sites = {"embeddings": rows}
    for layer in range(model.n_layer):
        h = f"h.{layer}."
        sites |= {f"{h}attn.weights": weights, f"{h}attn.c_proj": rows, f"{h}mlp.c_proj": rows}
    return sites


def _sites(side: str, steps: list[list[Sites]], config: TrainConfig) -> Result:
    """How many masks aren't of the site and shape that they should be."""
    expected = expected_sites(config).items()
    wrong = []
    for (step, parts), part in itertools.product(enumerate(steps), range(config.accumulation)):
        found = [tuple(_shape(site)) for site in parts[part]]
        wrong += [
            f"step {step}, part {part}: {shape or 'no mask'} where {due} of {in_words(name)} is due"
            for shape, (name, due) in itertools.zip_longest(found, expected, fillvalue=("what follows", None))
            if shape != due
        ]
    title = f"{side}: masks at rate {config.model.dropout} that aren't those of GPT-2's {len(expected)} sites"
    return Result("dropout", title, float(len(wrong)), limits.NONE, wrong[0] if wrong else "")


def _scales_and_shares(of_adapters: dict[Adapter, Masks], config: TrainConfig) -> Iterator[Result]:
    rate = config.model.dropout
    for adapter, drawn in of_adapters.items():
        if drawn.scale_error is not None:
            title = f"{adapter.name}: kept elements at rate {rate} are scaled by 1 / (1 - rate)"
            yield Result("dropout", title, drawn.scale_error, limits.DROPOUT_SCALE)
    for adapter, drawn in of_adapters.items():
        yield _shares(adapter.name, drawn.steps[:STEPS_LOOKED_AT], config)


def _shape(blocks: list[np.ndarray]) -> tuple[int, ...]:
    """Of a site's mask as a whole; the last block of queries has all the keys."""
    *outer, _, keys = blocks[-1].shape
    return (*outer, sum(block.shape[-2] for block in blocks), keys)


def _values(blocks: list[np.ndarray], rate: float) -> np.ndarray:
    """A site's masks side by side as they are drawn, each filled up to whole bytes, with mean 0 and variance 1; NaN
    where there is nothing to see."""
    padded = [
        np.pad(b.astype(np.int8), [(0, 0)] * (b.ndim - 1) + [(0, -b.shape[-1] % 8)], constant_values=-1) for b in blocks
    ]
    mask = np.concatenate(padded, axis=-1)
    return np.where(mask < 0, np.nan, (mask - (1.0 - rate)) / math.sqrt(rate * (1.0 - rate)))


def _stacked(steps: list[list[Sites]], config: TrainConfig) -> dict[str, np.ndarray]:
    """Each site's values (S, B, ...) over all steps and parts."""
    parts = [part for step in steps for part in step]
    return {
        name: np.stack([_values(part[number], config.model.dropout) for part in parts])
        for number, name in enumerate(expected_sites(config))
    }


def _shares(side: str, steps: list[list[Sites]], config: TrainConfig) -> Result:
    """The share that is kept at each site, of all of it and of each slice along each axis: exact binomial tests."""
    keep = 1.0 - config.model.dropout
    tests = []
    for name, values in _stacked(steps, config).items():
        kept, present = values > 0, ~np.isnan(values)
        for axis in range(values.ndim):
            others = tuple(a for a in range(values.ndim) if a != axis)
            counts = zip(kept.sum(others), present.sum(others), strict=True)
            tests += [(name, f"slice {i} of axis {axis}", k, n) for i, (k, n) in enumerate(counts) if n]
        tests.append((name, "all", kept.sum(), present.sum()))
    k, n = (np.array(column) for column in list(zip(*tests, strict=True))[2:])
    tails = np.minimum(scipy.special.bdtr(k, n, keep), scipy.special.bdtrc(k - 1, n, keep))
    log_p = np.log(2.0 * np.maximum(tails, np.finfo(np.float64).tiny))
    measured, (name, what, k, n) = first_surprise(log_p, tests, limits.SURPRISE)
    sites = len(expected_sites(config))
    title = f"{side}: share kept at rate {config.model.dropout}, {len(tests)} slices of {sites} sites, -log10 p"
    return Result(
        "dropout", title, measured, limits.SURPRISE, f"{in_words(name)}, {what}: {k / n:.4f} where {keep} is due"
    )


def _independence(side: str, steps: list[list[Sites]], config: TrainConfig) -> Iterator[Result]:
    """Any two sequences' masks, at any sites, steps and parts (the last step is the first of another seed); and any
    two sites' masks, or one with itself, displaced along their axes."""
    rate = config.model.dropout
    streams = {}
    for step, parts in enumerate(steps):
        seed = f"step {step}" if step < STEPS_LOOKED_AT else "another seed's step 0"
        for (part, sites), sequence in itertools.product(enumerate(parts), range(config.microbatch_size)):
            for name, blocks in zip(expected_sites(config), sites, strict=True):
                label = f"{in_words(name)} of {seed}, part {part}, sequence {sequence}"
                streams[label] = _values([block[sequence] for block in blocks], rate)
    scores, labels = aligned(list(streams.values())), list(streams)
    pairs = np.tril_indices(len(labels), -1)
    measured, (i, j) = first_surprise(two_sided(scores[pairs]), list(zip(*pairs, strict=True)), limits.SURPRISE)
    title = (
        f"{side}: correlation of masks by pairs, of {len(labels)} sites, sequences, parts, steps and seeds, -log10 p"
    )
    yield Result("dropout", title, measured, limits.SURPRISE, f"{labels[j]} with {labels[i]}")

    tests, found = 0, []
    stacked = _stacked(steps[:STEPS_LOOKED_AT], config)
    straight = {name: Displaceable(x) for name, x in stacked.items()}
    transposed = {name: Displaceable(x.swapaxes(-1, -2)) for name, x in stacked.items()}
    for (a, x), (b, y) in itertools.combinations_with_replacement(straight.items(), 2):
        if len(x.shape) != len(y.shape):
            continue
        # With itself neither the origin nor what is turned over the diagonal is independent.
        others = {"": y} | ({} if a == b else {", transposed": transposed[b]})
        for turned, z in others.items():
            scores = displaced(x, z)
            if a == b:
                scores.flat[0] = 0.0
            tests += scores.size
            peak = np.unravel_index(np.abs(scores).argmax(), scores.shape)
            by = [int(i) if i < m else int(i) - n for i, m, n in zip(peak, x.shape[1:], scores.shape, strict=True)]
            found.append((f"{in_words(a)} with {in_words(b)}{turned}, displaced by {by}", scores[peak]))
    measured, (where, _) = first_surprise(two_sided(np.array([z for _, z in found])), found, limits.SURPRISE, tests)
    title = f"{side}: correlation of masks displaced, {len(stacked)} sites, {tests:,} displacements, -log10 p"
    yield Result("dropout", title, measured, limits.SURPRISE, where)


def _in_other_precisions(
    adapter: Adapter, config: TrainConfig, batch: Batch, masks: list[Sites], precisions: Sequence[str]
) -> Result:
    """How many of an adapter's masks of the first step aren't those of float64."""
    names, wrong = list(expected_sites(config)), []
    for dtype in precisions:
        with jax.enable_x64(False):
            narrow = adapter.make(adapter.weights, dtype)
            (found,) = narrow.dropout_masks(dataclasses.replace(config, precision=dtype), [batch]).steps
        for (part, sites), (number, name) in itertools.product(enumerate(found), enumerate(names)):
            same = all(map(np.array_equal, sites[number], masks[part][number]))
            wrong += [] if same else [f"{dtype}, part {part}, {in_words(name)}"]
    title = f"{adapter.name}: masks of {' and '.join(precisions)} that aren't those of float64"
    return Result("dropout", title, float(len(wrong)), limits.NONE, wrong[0] if wrong else "")


def _first_difference(a: Trained, b: Trained) -> tuple[float, str]:
    """The largest difference of losses, and of gradient norms relatively; and the first beyond the limit."""
    differences = np.stack([np.abs(a.losses - b.losses), np.abs(a.grad_norms - b.grad_norms) / b.grad_norms], axis=1)
    beyond = np.argwhere(~(differences <= limits.CURVE))
    step, what = beyond[0] if len(beyond) else np.unravel_index(np.argmax(differences), differences.shape)
    where = f"{'first' if len(beyond) else 'largest'} at step {step}, {('loss', 'gradient norm')[what]}"
    return float(differences.max()), where


def _first_value(candidate: Adapter, reference: Adapter, config: TrainConfig, batch: Batch, masks: list[Sites]) -> str:
    """Where the first forward pass diverges, dropout included."""
    a = candidate.dropped_intermediates(config, batch)
    b = reference.intermediates_with_masks(config, batch, masks)
    found = divergence.compare({name: a[name] for name in b}, b, (candidate.name, reference.name))
    if all(d.difference <= limits.CURVE for d in found):
        return "; the first forward pass agrees, computed unrolled on one device"
    return "; " + first_beyond(found, limits.CURVE)
