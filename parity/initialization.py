"""Check `initialization`: both frameworks' own initialisers draw from the distributions GPT-2 prescribes, and every
tensor by itself.

Distributions and independence are looked at on a model of one size with the options of the one compared: in 4,096
values, the smallest random tensor here, a truncated normal or a uniform distribution of the same variance has a p-value
below 1e-10, and a correlation of 0.15 with another tensor too; in 300 neither can be told.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
import scipy.stats
import torch

import gpt2_torch.model
from gpt2_core.config import ModelConfig, ResolvedConfig
from gpt2_jax.definition import define
from gpt2_jax.mesh import parse_mesh
from gpt2_jax.model import Execution
from gpt2_jax.train_step import make_program
from gpt2_jax.weights import canonical_arrays as jax_arrays
from gpt2_torch.weights import canonical_arrays as torch_arrays
from parity.independence import aligned, displaced, first_surprise, surprise, two_sided
from parity.sides import PLAIN
from parity.suite import Result, Skipped, Subject

Arrays = dict[str, np.ndarray]

# -log10 of the probability that right initialisers look at least this unlikely in all tests of a case together: of the
# eight cases here, fewer than one run in a hundred thousand fails one.
LIMIT = 6.0
# Two layers, so that they can be told apart; a vocabulary that JAX pads.
SIZE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "mlp_width": None, "vocab_size": 300}
# The options that add random tensors or take constant ones away.
MORE_TENSORS = {"mlp": "swiglu", "tie_embeddings": False, "position": "learned", "qk_norm": True, "bias": False}
CELLS = 64
# Standard deviations. JAX's and Flax's truncated normal distributions end at 2.27, a uniform one at 1.73.
TAIL = 2.5


def check(subject: Subject) -> Iterator[Result | Skipped]:
    config = dataclasses.replace(subject.weights.config, **SIZE)
    yield from _of(config, _draw(config), subject.seed, "")
    if subject.level != "quick":
        more = dataclasses.replace(config, **MORE_TENSORS)
        draw = _draw(more)
        yield from _of(more, draw, subject.seed, "SwiGLU, untied head: ")
        yield from _wherever_drawn(more, draw(subject.seed), subject.seed)


def _of(config: ModelConfig, draw_params: Callable[[int], Arrays], seed: int, options: str) -> Iterator[Result]:
    params = draw_params(seed)
    tables = [params[name] for name in ("wte.weight", "lm_head.weight") if name in params]
    count = sum(np.count_nonzero(table[config.vocab_size :]) for table in tables)
    yield Result("initialization", f"{options}JAX: values in the rows that pad the vocabulary", float(count), 0.0)
    pooled = []
    for side, draw in (
        ("JAX", lambda seed: jax_arrays(draw_params(seed), config)),
        ("PyTorch", functools.partial(_torch, config)),
    ):
        arrays, again, other = draw(seed), draw(seed), draw(seed + 1)
        prescribed = {name: _prescribed(name, config) for name in arrays}
        constant = {name: mean for name, (mean, deviation) in prescribed.items() if deviation == 0.0}
        wrong = [name for name, value in constant.items() if not (arrays[name] == value).all()]
        case = f"{options}{side}: biases that aren't 0 and norms that aren't 1, of {len(constant)}"
        yield Result("initialization", case, float(len(wrong)), 0.0, wrong[0] if wrong else "")
        values, others = (
            {
                name: (x[name].astype(np.float64) - mean) / deviation
                for name, (mean, deviation) in prescribed.items()
                if deviation
            }
            for x in (arrays, other)
        )
        yield _distributions(f"{options}{side}: ", values)
        yield _pairs(f"{options}{side}: ", values, others)
        yield _repetition(f"{options}{side}: ", values)
        changed = [name for name in arrays if not np.array_equal(arrays[name], again[name])]
        case = f"{options}{side}: tensors that one seed doesn't give twice"
        yield Result("initialization", case, float(len(changed)), 0.0, changed[0] if changed else "")
        pooled.append(np.concatenate([value.ravel() for value in values.values()]))
    p = scipy.stats.ks_2samp(*pooled).pvalue
    case = f"{options}JAX and PyTorch draw from one family, {pooled[0].size:,} values each, -log10 p"
    yield Result("initialization", case, float(surprise(np.log(max(p, 1e-300)), 1)), LIMIT)


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
    measured, (where, _) = first_surprise(np.array([log_p for _, log_p in tests]), tests, LIMIT)
    case = f"{label}mean, variance and normal shape of {len(values)} tensors, -log10 p"
    return Result("initialization", case, measured, LIMIT, where)


def _pairs(label: str, values: Arrays, others: Arrays) -> Result:
    """Any two tensors, this seed's or the next one's, and their transposes."""
    named = values | {f"the next seed's {name}": value for name, value in others.items()}
    streams = [(name, turned) for name in named for turned in ("", ", transposed")]
    scores = aligned([named[name].T if turned else named[name] for name, turned in streams])
    # A tensor isn't independent of its own transpose.
    pairs = [(i, j) for i, j in itertools.combinations(range(len(streams)), 2) if streams[i][0] != streams[j][0]]
    measured, (i, j) = first_surprise(two_sided(np.array([scores[pair] for pair in pairs])), pairs, LIMIT)
    case = f"{label}correlation of {len(named)} tensors of two seeds by pairs, -log10 p"
    return Result("initialization", case, measured, LIMIT, f"{''.join(streams[i])} with {''.join(streams[j])}")


def _repetition(label: str, values: Arrays) -> Result:
    """Each tensor with itself displaced."""
    tests, found = 0, []
    for name, value in values.items():
        scores = displaced(value[None], value[None])
        scores.flat[0] = 0.0
        tests += scores.size
        found.append((name, scores.flat[np.abs(scores).argmax()]))
    measured, (where, _) = first_surprise(two_sided(np.array([z for _, z in found])), found, LIMIT, tests)
    case = f"{label}correlation of each tensor with itself displaced, {tests:,} displacements, -log10 p"
    return Result("initialization", case, measured, LIMIT, where)


def _wherever_drawn(config: ModelConfig, params: Arrays, seed: int) -> Iterator[Result | Skipped]:
    """Whether JAX draws the same in another precision and on a mesh."""
    with jax.enable_x64(False):
        single = _draw(config, "float32")(seed)
    yield _unequal("JAX: tensors that float32 draws otherwise", single, params)
    mesh = "data=2,fsdp=2,tensor=2"
    if math.prod(parse_mesh(mesh).values()) > len(jax.devices()):
        yield Skipped("initialization", f"{mesh}: there are {len(jax.devices())} devices")
        return
    run = ResolvedConfig(model=config, precision="float64", seed=seed, mesh=mesh, attention="xla", norm_kernel="xla")
    state = make_program(run).initial_state()
    yield _unequal(f"JAX: tensors born otherwise on {mesh}", state.params, params)


def _unequal(case: str, found: Arrays, expected: Arrays) -> Result:
    """How many tensors are others, beyond the last digits of the float32 in which they are drawn."""
    wrong = [n for n in expected if not np.allclose(found[n], expected[n], rtol=1e-5, atol=0.0, equal_nan=False)]
    return Result("initialization", case, float(len(wrong)), 0.0, wrong[0] if wrong else "")


def _draw(config: ModelConfig, dtype: str = "float64") -> Callable[[int], Arrays]:
    """(seed) -> JAX's own parameters."""
    initialize = jax.jit(define(config, Execution(dtype)).initialize, compiler_options=PLAIN)
    return lambda seed: {name: np.asarray(x) for name, x in initialize(jax.random.key(seed)).items()}


def _torch(config: ModelConfig, seed: int) -> Arrays:
    torch.manual_seed(seed)
    return torch_arrays(gpt2_torch.model.GPT2(config).state_dict(), config)
