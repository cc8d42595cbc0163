"""Check `initialization`: the initialisers of both draw from the distributions GPT-2 prescribes, and every tensor by
itself.

Distributions and independence are looked at on a model of one size with the options of the one compared: in 4,096
values, the smallest random tensor here, a truncated normal or a uniform distribution of the same variance has a p-value
below 1e-10, and a correlation of 0.15 with another tensor too; in 300 neither can be told.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import scipy.stats

from gpt2_core.config import ModelConfig
from parity.engine.adapter import lacking
from parity.engine.independence import Displaceable, aligned, displaced, first_surprise, surprise, two_sided
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import (
    BORN_ON_MESH,
    INITIALIZATION,
    NARROW_INITIALIZATION,
    PADDING,
    Adapter,
    Arrays,
)
from parity.gpt2.cases import Case

# Two layers, so that they can be told apart; a vocabulary that JAX pads.
SIZE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "mlp_width": None, "vocab_size": 300}
# The options that add random tensors or take constant ones away.
MORE_TENSORS = {"mlp": "swiglu", "tie_embeddings": False, "position": "learned", "qk_norm": True, "bias": False}
CELLS = 64
# Standard deviations. JAX's and Flax's truncated normal distributions end at 2.27, a uniform one at 1.73.
TAIL = 2.5


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    config = dataclasses.replace(case.weights.config, **SIZE)
    yield from _of(config, candidate, reference, case.seed, "")
    if case.at(False, True):
        more = dataclasses.replace(config, **MORE_TENSORS)
        yield from _of(more, candidate, reference, case.seed, "SwiGLU, untied head: ")
        # A seed that no mistake would put in its place.
        yield from _wherever_drawn(more, candidate, case.seed + 7)


def _of(
    config: ModelConfig, candidate: Adapter, reference: Adapter, seed: int, options: str
) -> Iterator[Result | Skipped]:
    if skipped := lacking(
        "initialization", f"{options}values in the rows that pad the vocabulary", (candidate, PADDING)
    ):
        yield skipped
    else:
        count = candidate.padding_values(config, seed)
        title = f"{options}{candidate.name}: values in the rows that pad the vocabulary"
        yield Result("initialization", title, float(count), limits.NONE)
    pooled = []
    for adapter in (candidate, reference):
        label = f"{options}{adapter.name}: "
        if skipped := lacking("initialization", f"{options}initial weights", (adapter, INITIALIZATION)):
            yield skipped
            continue
        arrays, again, other = (adapter.initialize(config, s) for s in (seed, seed, seed + 1))
        prescribed = {name: _prescribed(name, config) for name in arrays}
        constant = {name: mean for name, (mean, deviation) in prescribed.items() if deviation == 0.0}
        wrong = [name for name, value in constant.items() if not (arrays[name] == value).all()]
        title = f"{label}biases that aren't 0 and norms that aren't 1, of {len(constant)}"
        yield _count(title, wrong)
        values, others = (
            {
                name: (x[name].astype(np.float64) - mean) / deviation
                for name, (mean, deviation) in prescribed.items()
                if deviation
            }
            for x in (arrays, other)
        )
        yield _distributions(label, values)
        yield _pairs(label, values, others)
        yield _repetition(label, values)
        changed = [name for name in arrays if not np.array_equal(arrays[name], again[name])]
        yield _count(f"{label}tensors that one seed doesn't give twice", changed)
        pooled.append(np.concatenate([value.ravel() for value in values.values()]))
    if len(pooled) == 2:
        yield _family(options, (candidate.name, reference.name), *pooled)


def _family(options: str, names: tuple[str, str], ours: np.ndarray, theirs: np.ndarray) -> Result:
    """Whether both draw from one distribution (Kolmogorov-Smirnov), whichever that is."""
    found = scipy.stats.ks_2samp(ours, theirs)
    title = f"{options}{' and '.join(names)} draw from one family, {ours.size:,} values each, -log10 p"
    more = names[0] if found.statistic_sign > 0 else names[1]
    where = (
        f"most apart at {found.statistic_location:+.2f} deviations, below which {more} has {found.statistic:.1%} more"
    )
    measured = float(surprise(np.log(max(found.pvalue, 1e-300)), 1))
    return Result("initialization", title, measured, limits.SURPRISE, where)


def _prescribed(name: str, config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation (Radford et al. 2019; the code published with it)."""
    if name.endswith(".bias"):
        return 0.0, 0.0
    if ".ln_" in f".{name}" or "_norm." in name:
        return 1.0, 0.0
    if name.endswith("c_proj.weight"):
        return 0.0, 0.02 / math.sqrt(2 * config.n_layer)
    return 0.0, 0.02


def _distributions(label: str, values: Arrays) -> Result:
    """Of each tensor the mean, the variance, the counts in CELLS cells of equal probability (Pearson's chi-square) and
    in the tails (exactly); of all of them Kolmogorov and Smirnov's largest distance."""
    edges = scipy.stats.norm.ppf(np.arange(1, CELLS) / CELLS)
    tests = []
    for name, value in values.items():
        x, n = value.ravel(), value.size
        squares = np.square(x).sum()
        tails = min(scipy.stats.chi2.logcdf(squares, n), scipy.stats.chi2.logsf(squares, n))
        counts = np.bincount(np.searchsorted(edges, x), minlength=CELLS)
        beyond = int((np.abs(x) > TAIL).sum())
        pearson = np.square(counts - n / CELLS).sum() / (n / CELLS)
        tests += [
            (f"mean of {name}: {x.mean():.1e} standard deviations", two_sided(x.mean() * math.sqrt(n))),
            (f"variance of {name}: {squares / n:.3f} of what is due", tails + math.log(2.0)),
            (f"shape of {name}", scipy.stats.chi2.logsf(pearson, CELLS - 1)),
            (
                f"shape of {name}: {beyond} of {n} values beyond {TAIL} standard deviations",
                np.log(scipy.stats.binomtest(beyond, n, 2 * scipy.stats.norm.sf(TAIL)).pvalue + 1e-300),
            ),
        ]
    everything = np.concatenate([value.ravel() for value in values.values()])
    tests.append(("shape of all together", np.log(max(scipy.stats.kstest(everything, "norm").pvalue, 1e-300))))
    measured, (where, _) = first_surprise(np.array([log_p for _, log_p in tests]), tests, limits.SURPRISE)
    title = f"{label}mean, variance and normal shape of {len(values)} tensors, -log10 p"
    return Result("initialization", title, measured, limits.SURPRISE, where)


def _pairs(label: str, values: Arrays, others: Arrays) -> Result:
    """Any two tensors, this seed's or the next one's, and their transposes."""
    named = values | {f"the next seed's {name}": value for name, value in others.items()}
    streams = [(name, turned) for name in named for turned in ("", ", transposed")]
    scores = aligned([named[name].T if turned else named[name] for name, turned in streams])
    # A tensor isn't independent of its own transpose.
    pairs = [(i, j) for i, j in itertools.combinations(range(len(streams)), 2) if streams[i][0] != streams[j][0]]
    measured, (i, j) = first_surprise(two_sided(np.array([scores[pair] for pair in pairs])), pairs, limits.SURPRISE)
    title = f"{label}correlation of {len(named)} tensors of two seeds by pairs, -log10 p"
    return Result(
        "initialization", title, measured, limits.SURPRISE, f"{''.join(streams[i])} with {''.join(streams[j])}"
    )


def _repetition(label: str, values: Arrays) -> Result:
    """Each tensor with itself displaced."""
    tests, found = 0, []
    for name, value in values.items():
        itself = Displaceable(value[None])
        scores = displaced(itself, itself)
        scores.flat[0] = 0.0
        tests += scores.size
        found.append((name, scores.flat[np.abs(scores).argmax()]))
    measured, (where, _) = first_surprise(two_sided(np.array([z for _, z in found])), found, limits.SURPRISE, tests)
    title = f"{label}correlation of each tensor with itself displaced, {tests:,} displacements, -log10 p"
    return Result("initialization", title, measured, limits.SURPRISE, where)


def _wherever_drawn(config: ModelConfig, candidate: Adapter, seed: int) -> Iterator[Result | Skipped]:
    """Whether the candidate draws the same in another precision and on a mesh."""
    if skipped := lacking("initialization", "weights drawn in float32", (candidate, NARROW_INITIALIZATION)):
        yield skipped
    else:
        changed = candidate.changed_by_precision(config, seed)
        yield _count(f"{candidate.name}: tensors that float32 draws otherwise", changed)
    mesh = "data=2,fsdp=2,tensor=2"
    if skipped := lacking("initialization", "weights born on a mesh", (candidate, BORN_ON_MESH)):
        yield skipped
    elif candidate.devices_of(mesh) > candidate.devices():
        yield Skipped("initialization", f"{mesh}: there are {candidate.devices()} devices")
    else:
        changed = candidate.changed_by_mesh(config, seed, mesh)
        yield _count(f"{candidate.name}: tensors born otherwise on {mesh}", changed)


def _count(title: str, wrong: list[str]) -> Result:
    return Result("initialization", title, float(len(wrong)), limits.NONE, wrong[0] if wrong else "")
