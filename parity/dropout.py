"""Check `dropout`: the masks that each framework draws, and training with them, PyTorch given those that JAX drew.

What masks are like is a matter of their shapes and not of the weights: they are looked at on a small model with the
options of the one compared, whose lengths are no multiples of what masks are packed in. The masks that the train step
uses are those looked at, because PyTorch, given them, trains the same. cuDNN's attention has no dropout here (see
gpt2_jax.attention), so there are no masks that can't be seen.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import scipy.stats

from gpt2_core.batches import Batch, TrainingBatches
from gpt2_core.config import ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.weights import Weights
from gpt2_jax.mesh import parse_mesh
from parity import places
from parity.independence import aligned, displaced, first_surprise, two_sided
from parity.sides import JaxSide, Sites, TorchSide, Trained
from parity.subjects import random_weights
from parity.suite import Result, Skipped, Subject

LIMIT = 1e-11  # as for a loss curve without dropout: with the same masks it is one
LIMIT_P = 6.0  # -log10 p of all tests of a case together, as in `initialization`
LIMIT_SCALE = 1e-12  # of kept elements: attention weights computed twice differ in their last digits
# Neither is GPT-2's 0.1, and neither is 1 minus itself. The statistics of pairs are taken at the first, where products
# of masks are nearly symmetric; they see a correlation of 0.1 in any two masks.
RATES = (0.4, 0.15)
STEPS_LOOKED_AT = 3
# What is drawn doesn't depend on how it is computed. Each at one of the rates.
MODES = {
    "xla attention": {"attention": "xla"},
    "recompute attention, data=2, fsdp=2, tensor=2": {"attention": "recompute", "mesh": "data=2,fsdp=2,tensor=2"},
    "scan, remat, data=2": {"attention": "xla", "mesh": "data=2", "scan_layers": True, "remat": True},
}


def check(subject: Subject) -> Iterator[Result | Skipped]:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 36, "block_size": 68, "mlp_width": None}
    plain = dataclasses.replace(subject.weights.config, dropout=0.0, **shape)
    weights = random_weights(plain)
    ours, theirs = JaxSide(weights), TorchSide(weights)
    steps = subject.at(5, 20)
    stream = TrainingBatches(subject.tokens, block_size=plain.block_size, batch_size=8, seed=subject.seed)
    batches = [stream[step] for step in range(steps)]
    modes = subject.at(list(MODES)[:1], list(MODES))

    # Where no key is given, as in evaluation and generation, nothing is dropped.
    dropping = dataclasses.replace(weights, config=dataclasses.replace(plain, dropout=RATES[0]))
    tokens_BT = batches[0].inputs[:1]
    for name, dropped, undropped in (
        ("PyTorch", TorchSide(dropping).logits, theirs.logits),
        ("JAX", JaxSide(dropping).plain_logits, ours.plain_logits),
    ):
        difference = np.abs(dropped(tokens_BT) - undropped(tokens_BT)).max()
        yield Result("dropout", f"{name}: evaluation drops nothing", float(difference), 0.0)

    for number, rate in enumerate(RATES):
        config = _config(plain, rate, steps, subject.seed)
        masks = ours.dropout_masks(config, batches)
        drawn, scale_error = theirs.dropout_masks(config, batches[:STEPS_LOOKED_AT])
        placed = [_sites("JAX", masks, config), _sites("PyTorch", drawn, config)]
        yield from placed
        if not all(result.passed for result in placed):
            continue  # there is no telling whose mask is whose
        case = f"PyTorch: kept elements at rate {rate} are scaled by 1 / (1 - rate)"
        yield Result("dropout", case, scale_error, LIMIT_SCALE)
        for name, of_side in (("JAX", masks), ("PyTorch", drawn)):
            yield _shares(name, of_side[:STEPS_LOOKED_AT], config)
        if number == 0:
            precisions = subject.at(("bfloat16",), ("float32", "bfloat16"))
            yield _in_other_precisions(weights, config, batches[0], masks[0], precisions)
            other = dataclasses.replace(config, seed=config.seed + 1)
            yield from _independence("JAX", [*masks[:STEPS_LOOKED_AT], *ours.dropout_masks(other, batches[:1])], config)
            others, _ = theirs.dropout_masks(other, batches[:1])
            yield from _independence("PyTorch", [*drawn, *others], config)
        b = theirs.train(config, batches, masks)
        for name in modes[number :: len(RATES)]:
            settings = MODES[name]
            if math.prod(parse_mesh(settings.get("mesh", 1)).values()) > len(jax.devices()):
                yield Skipped("dropout", f"{name}: there are {len(jax.devices())} devices")
                continue
            a = ours.train(dataclasses.replace(config, **settings), batches)
            measured, where = _first_difference(a, b)
            if not measured <= LIMIT:
                where += _place(ours, theirs, config, batches[0], masks[0])
            case = f"{steps} steps at rate {rate}, {name}, PyTorch given JAX's masks"
            yield Result("dropout", case, measured, LIMIT, where)


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
            f"step {step}, part {part}: {shape or 'no mask'} where {due} of {places.in_words(name)} is due"
            for shape, (name, due) in itertools.zip_longest(found, expected, fillvalue=("what follows", None))
            if shape != due
        ]
    case = f"{side}: masks at rate {config.model.dropout} that aren't those of GPT-2's {len(expected)} sites"
    return Result("dropout", case, float(len(wrong)), 0.0, wrong[0] if wrong else "")


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
    tails = np.minimum(scipy.stats.binom.logcdf(k, n, keep), scipy.stats.binom.logsf(k - 1, n, keep))
    measured, (name, what, k, n) = first_surprise(tails + math.log(2.0), tests, LIMIT_P)
    sites = len(expected_sites(config))
    case = f"{side}: share kept at rate {config.model.dropout}, {len(tests)} slices of {sites} sites, -log10 p"
    return Result(
        "dropout", case, measured, LIMIT_P, f"{places.in_words(name)}, {what}: {k / n:.4f} where {keep} is due"
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
                label = f"{places.in_words(name)} of {seed}, part {part}, sequence {sequence}"
                streams[label] = _values([block[sequence] for block in blocks], rate)
    scores, labels = aligned(list(streams.values())), list(streams)
    pairs = np.tril_indices(len(labels), -1)
    measured, (i, j) = first_surprise(two_sided(scores[pairs]), list(zip(*pairs, strict=True)), LIMIT_P)
    case = f"{side}: correlation of masks by pairs, of {len(labels)} sites, sequences, parts, steps and seeds, -log10 p"
    yield Result("dropout", case, measured, LIMIT_P, f"{labels[j]} with {labels[i]}")

    tests, found = 0, []
    stacked = _stacked(steps[:STEPS_LOOKED_AT], config)
    for (a, x), (b, y) in itertools.combinations_with_replacement(stacked.items(), 2):
        if x.ndim != y.ndim:
            continue
        # With itself neither the origin nor what is turned over the diagonal is independent.
        others = {"": y} | ({} if a == b else {", transposed": y.swapaxes(-1, -2)})
        for turned, z in others.items():
            scores = displaced(x, z)
            if a == b:
                scores.flat[0] = 0.0
            tests += scores.size
            peak = np.unravel_index(np.abs(scores).argmax(), scores.shape)
            by = [int(i) if i < m else int(i) - n for i, m, n in zip(peak, x.shape[1:], scores.shape, strict=True)]
            found.append((f"{places.in_words(a)} with {places.in_words(b)}{turned}, displaced by {by}", scores[peak]))
    measured, (where, _) = first_surprise(two_sided(np.array([z for _, z in found])), found, LIMIT_P, tests)
    case = f"{side}: correlation of masks displaced, {len(stacked)} sites, {tests:,} displacements, -log10 p"
    yield Result("dropout", case, measured, LIMIT_P, where)


def _in_other_precisions(
    weights: Weights, config: TrainConfig, batch: Batch, masks: list[Sites], precisions: Sequence[str]
) -> Result:
    """How many of JAX's masks of the first step aren't those of float64."""
    names, wrong = list(expected_sites(config)), []
    for dtype in precisions:
        with jax.enable_x64(False):
            found = JaxSide(weights, dtype).dropout_masks(dataclasses.replace(config, precision=dtype), [batch])[0]
        for (part, sites), (number, name) in itertools.product(enumerate(found), enumerate(names)):
            same = all(map(np.array_equal, sites[number], masks[part][number]))
            wrong += [] if same else [f"{dtype}, part {part}, {places.in_words(name)}"]
    case = f"JAX: masks of {' and '.join(precisions)} that aren't those of float64"
    return Result("dropout", case, float(len(wrong)), 0.0, wrong[0] if wrong else "")


def _first_difference(a: Trained, b: Trained) -> tuple[float, str]:
    """The largest difference of losses, and of gradient norms relatively; and the first beyond the limit."""
    differences = np.stack([np.abs(a.losses - b.losses), np.abs(a.grad_norms - b.grad_norms) / b.grad_norms], axis=1)
    beyond = np.argwhere(~(differences <= LIMIT))
    step, what = beyond[0] if len(beyond) else np.unravel_index(np.argmax(differences), differences.shape)
    where = f"{'first' if len(beyond) else 'largest'} at step {step}, {('loss', 'gradient norm')[what]}"
    return float(differences.max()), where


def _place(ours: JaxSide, theirs: TorchSide, config: TrainConfig, batch: Batch, masks: list[Sites]) -> str:
    """Where the first forward pass parts, dropout included."""
    a, b = ours.dropped_intermediates(config, batch), theirs.dropped_intermediates(config, batch, masks)
    found = places.compare({name: a[name] for name in b}, b)
    if all(place.difference <= LIMIT for place in found):
        return "; the first forward pass agrees, computed unrolled on one device"
    return "; " + places.first_beyond(found, LIMIT)
