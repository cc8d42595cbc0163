"""Check `precision`: in float32 and bfloat16 JAX is no further from the float64 truth than PyTorch is.

Two right programs differ in these dtypes, and comparing them with each other says little. Compared with the truth each
has an error, and the two errors must be of one size. What so small a model can't show, the traced program does: which
of its operations are in which dtype.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from gpt2_core.batches import Batch
from gpt2_core.config import ModelConfig, ResolvedConfig
from gpt2_core.weights import Weights
from gpt2_jax.definition import define
from gpt2_jax.mesh import format_mesh
from gpt2_jax.runtime import matmul_precision
from gpt2_jax.train_step import loss_and_grads, make_program
from parity import dataflow, places, variants
from parity.gradients import uneven_batch
from parity.sides import Arrays, JaxSide, TorchSide
from parity.subjects import random_weights
from parity.suite import Result, Skipped, Subject

# JAX's error over PyTorch's: what orders of summation and places of rounding may make of it. A lost digit is a factor
# of ten, the fast variance of layer norm up to 29.
LIMIT = 1.25

# How often at most a case whose true ratio is at the limit exceeds it by chance.
FALSE_ALARMS = 1e-3

# A loss against the cross-entropy of the same program's logits, which leaves out what happened before them: float32
# rounds the sum at 1e-7. Rounded to bfloat16 once more, each logit is off by up to 4e-3.
LOSS_LIMIT = 1e-6

# Ways of executing a model, whose traced programs differ.
EXECUTIONS: dict[str, dict[str, bool]] = {
    "unrolled": {},
    "scanned and rematerialised": {"scan_layers": True, "remat": True},
    "rematerialised": {"remat": True},
    "scanned": {"scan_layers": True},
}

_EXCHANGES = frozenset({"psum", "reduce_scatter"})
_EXPONENTIALS = frozenset({"exp", "exp2", "log", "log1p"})
# And sums, and what a norm divides by.
_WIDE = _EXPONENTIALS | {"cumsum", "reduce", "reduce_sum", "rsqrt", "scatter-add", "sqrt"}
_SUMS = dataflow.LAYOUT | {"add", "add_any"}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a side gives for one sequence: gradients by canonical name, "logits", and the loss."""

    arrays: Arrays
    loss: float


def check(subject: Subject) -> Iterator[Result | Skipped]:
    yield from programs(subject)
    yield from _bfloat16_program(_with_every_option(subject), "unrolled")
    yield from _exchanges(subject)
    yield _residual_stream(subject)
    weights = [subject.weights]
    if subject.weights.source.startswith("random"):
        weights += [random_weights(subject.weights.config, seed) for seed in subject.at((), (1, 2))]
    batches = _sequences(subject, subject.at(8, 8, 16))
    truths = _by_torch(weights, batches, "float64")
    for dtype in ("float32", "bfloat16"):
        ours, theirs = _by_jax(weights, batches, dtype), _by_torch(weights, batches, dtype)
        tf32 = None
        if dtype == "float32" and jax.default_backend() != "cpu":
            # What JAX's default, products of float32 in TF32, costs on this accelerator.
            with jax.default_matmul_precision("default"):
                tf32 = _by_jax(weights, batches, dtype)
        yield from compare(subject, dtype, ours, theirs, truths, tf32)
        yield _loss(dtype, batches * len(weights), ours, theirs, truths)


def compare(
    subject: Subject,
    dtype: str,
    ours: Sequence[Drawn],
    theirs: Sequence[Drawn],
    truths: Sequence[Drawn],
    tf32: Sequence[Drawn] | None = None,
) -> Iterator[Result]:
    """A case for the logits and one for each kind of gradient, over the sequences drawn: `at_least` of their ratios."""
    kinds: dict[str, list[str]] = {"logits": ["logits"]}
    for name in list(truths[0].arrays)[1:]:
        kinds.setdefault(_kind(name), []).append(name)
    for kind, names in kinds.items():
        a, b = (np.array([[_error(d, t, n) for d, t in _pairs(s, truths)] for n in names]) for s in (ours, theirs))
        logs = np.log(a / b)
        where = f"{_place(names, logs)}: {_in_words(logs.mean(axis=0))}, errors {_rms(a):.1e} and {_rms(b):.1e}"
        if kind == "logits":
            where += f"; {_agreement(ours, theirs, truths)}"
        if tf32 is not None:
            found = np.array([[_error(d, t, n) for d, t in _pairs(tf32, truths)] for n in names])
            where += f"; with TF32 JAX's would be {_rms(found):.1e}"
        subject.evidence[f"precision {dtype} {kind}"] = list(zip(_rms(a, axis=1), _rms(b, axis=1), strict=True))
        case = f"{dtype} {kind}: JAX's error over PyTorch's is at least, by {logs.shape[1]} sequences"
        yield Result("precision", case, at_least(logs.mean(axis=0)), LIMIT, where)


def at_least(logs: np.ndarray) -> float:
    """The ratio that the mean of these logarithms of ratios proves: the lower end of its t interval (Student 1908),
    which lies above the true one in FALSE_ALARMS of all cases."""
    spread = np.std(logs, ddof=1) / math.sqrt(len(logs))
    return float(np.exp(np.mean(logs) - stats.t.ppf(1 - FALSE_ALARMS, len(logs) - 1) * spread))


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square error over the truth's root mean square."""
    truth = truth.astype(np.float64)
    return float(np.sqrt(np.mean((value.astype(np.float64) - truth) ** 2) / np.mean(truth**2)))


def programs(subject: Subject) -> Iterator[Result]:
    """What JAX's traced training programs compute in which dtype, whatever the sizes."""
    with jax.enable_x64(False):
        program = _program(subject, "float32")
        other = [v for v in program.values() if v.is_float and v.dtype != np.float32]
        yield _none("float32 program: values in another dtype", other)
        full = (jax.lax.Precision.HIGHEST,) * 2
        products = [o for o in program.operations if o.primitive == "dot_general" and o.params["precision"] != full]
        yield _none("float32 program: products that may be done in TF32", products)

    for name in subject.at(list(EXECUTIONS)[:2], EXECUTIONS):
        yield from _bfloat16_program(subject, name)


def _with_every_option(subject: Subject) -> Subject:
    """A small model with the architectural options that the subject may not have."""
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257, **variants.OPTIONS["all at once"]
    )
    return dataclasses.replace(subject, weights=random_weights(config), tokens=subject.tokens % config.vocab_size)


def _bfloat16_program(subject: Subject, execution: str) -> Iterator[Result]:
    config = subject.weights.config
    with jax.enable_x64(False):
        program = _program(subject, "bfloat16", **EXECUTIONS[execution])
    options = "" if config.norm == "layernorm" else f", {config.norm} and {config.mlp}"
    name = f"bfloat16 program, {execution}{options}"
    yield _residual_additions(name, program, 1 if "scan" in execution else config.n_layer)
    softmax = [v for o in program.operations if o.primitive in _EXPONENTIALS for v in o.operands]
    found = _narrow(program.outputs[:1] + softmax, dataflow.ELEMENTWISE)
    yield _none(f"{name}: softmax and loss, from their logits on, in bfloat16", found)
    sums = [o for o in program.operations if o.primitive in _WIDE and any(v.is_narrow for v in o.operands)]
    yield _none(f"{name}: sums, roots and exponentials of bfloat16", sums)
    # A constant of the program has no maker.
    rounded = [o for o in program.operations if o.primitive == "convert_element_type" and o.operands[0].makers]
    scalars = [v for o in rounded for v in o.results if v.is_narrow and not v.shape]
    yield _none(f"{name}: numbers that scale whole arrays, in bfloat16", scalars)
    # Parameters are the first inputs, in the order of their names.
    parameters = zip(sorted(config.parameter_shapes), program.inputs, strict=False)
    norms = [value for parameter, value in parameters if _kind(parameter) == "gradients of norms"]
    found = [v for v in dataflow.after(program, norms, dataflow.LAYOUT) if v.is_narrow]
    yield _none(f"{name}: weights of norms, in bfloat16", found)
    products = [o for o in program.operations if o.primitive == "add" and all(map(_is_narrow_product, o.operands))]
    yield _none(f"{name}: sums of matrix products that are rounded to bfloat16 first", products)
    found = _narrow(program.outputs[1:], dataflow.ELEMENTWISE)
    yield _none(f"{name}: gradients of parameters, from the sum that makes them on, in bfloat16", found)


def _exchanges(subject: Subject) -> Iterator[Result | Skipped]:
    """What devices exchange in a step of bfloat16, in the dtype that was asked for: scalars are float32 always."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 1}
    if len(jax.devices()) < 4:
        yield Skipped("precision", f"dtypes of what is exchanged: needs 4 devices and there are {len(jax.devices())}")
        return
    model = subject.weights.config
    for asked in ("float32", "bfloat16"):
        config = ResolvedConfig(
            model=model,
            batch_size=4,
            precision="bfloat16",
            mesh=format_mesh(sizes),
            attention="xla",
            norm_kernel="xla",
            gradient_exchange=asked,
        )
        with jax.enable_x64(False):
            training = make_program(config)
            tokens = jax.ShapeDtypeStruct((1, 4, model.block_size), np.int32)
            rate = jax.ShapeDtypeStruct((), np.float32)
            with jax.set_mesh(training.mesh):
                program = dataflow.trace(training.train_step, training.abstract_state, tokens, tokens, rate)
        sent = [v for o in program.operations if o.primitive in _EXCHANGES for v in o.operands if v.shape]
        other = [v for v in sent if np.dtype(v.dtype).name != asked]
        case = f"gradients exchanged in another dtype than {asked}, of {len(sent)} arrays"
        # Nothing exchanged at all would be as wrong.
        yield Result("precision", case, float(len(other) if sent else 1), 0.0, f"first {other[0]}" if other else "")


def _program(subject: Subject, dtype: str, **execution: bool) -> dataflow.Graph:
    """Of logits, loss and gradients, in this order; in two parts, whose gradients are added up."""
    side = JaxSide(subject.weights, dtype)
    definition = define(side.config, dataclasses.replace(side.definition.execution, **execution))
    inputs, targets = (jnp.asarray(x).reshape(2, -1, x.shape[-1]) for x in uneven_batch(subject))

    def compute(params, inputs, targets):
        loss, grads = loss_and_grads(definition, params, inputs, targets)
        return (definition.merge(params)(inputs[0]), loss), grads

    with jax.default_matmul_precision(matmul_precision(dtype)):
        return dataflow.trace(compute, side.params, inputs, targets)


def _residual_additions(name: str, program: dataflow.Graph, blocks: int) -> Result:
    """What is looked up in the embeddings and everything that it is added up to, and what their gradients are added
    from: an addition that can't be found counts too."""
    embedded = [o.results[0] for o in program.operations if o.primitive == "gather" and o.results[0].is_float]
    found = dataflow.after(program, embedded, _SUMS)
    gradient = [o.operands[2] for o in program.operations if o.primitive == "scatter-add"]
    narrow = [v for v in found if v.is_narrow] + _narrow(gradient, _SUMS)
    additions = {id(o) for v in found for o in v.makers if o.primitive == "add"}
    # Two a block of the program, in the logits' forward pass and in the loss's.
    missing = max(0, 4 * blocks - len(additions))
    case = f"{name}: values of the residual stream in bfloat16, or lost"
    where = f"first {narrow[0]}" if narrow else f"{len(additions)} additions, all in float32"
    return Result("precision", case, float(len(narrow) + missing), 0.0, where)


def _is_narrow_product(value: dataflow.Value) -> bool:
    made = [o for v in dataflow.before(value, dataflow.LAYOUT | {"add"}) if v.is_narrow for o in v.makers]
    return value.is_narrow and any(o.primitive == "dot_general" for o in made)


def _narrow(values: Collection[dataflow.Value], through: Collection[str]) -> list[dataflow.Value]:
    return [v for value in values for v in dataflow.before(value, through) if v.is_narrow]


def _none(case: str, found: Sequence[dataflow.Value | dataflow.Operation]) -> Result:
    return Result("precision", case, float(len(found)), 0.0, f"first {found[0]}" if found else "")


def _residual_stream(subject: Subject) -> Result:
    """Looked at where it is tapped, on both sides."""
    tokens_BT = subject.tokens[: subject.weights.config.block_size][None]
    seen: dict[str, set[str]] = {"JAX": set(), "PyTorch": set()}
    for dtype in ("float32", "bfloat16"):
        with jax.enable_x64(False):
            ours = JaxSide(subject.weights, dtype).dtypes(tokens_BT)
        for side, dtypes in (("JAX", ours), ("PyTorch", TorchSide(subject.weights, dtype).dtypes(tokens_BT))):
            seen[side] |= {found for name, found in dtypes.items() if name == "embeddings" or ".residual_" in name}
    where = ", ".join(f"{side} {' and '.join(sorted(found))}" for side, found in seen.items())
    others = set.union(*seen.values()) - {"float32"}
    return Result(
        "precision", "dtypes of the residual stream besides float32, in both dtypes", float(len(others)), 0.0, where
    )


def _sequences(subject: Subject, number: int) -> list[Batch]:
    """Sequences from all over the text."""
    T = subject.weights.config.block_size
    starts = np.linspace(0, len(subject.tokens) - T - 1, number).astype(int)
    windows = [subject.tokens[start : start + T + 1][None] for start in starts]
    return [Batch(np.ascontiguousarray(w[:, :-1]), np.ascontiguousarray(w[:, 1:])) for w in windows]


def _by_torch(weights: Sequence[Weights], batches: Sequence[Batch], dtype: str) -> list[Drawn]:
    return [_drawn(side, batch) for side in (TorchSide(w, dtype) for w in weights) for batch in batches]


def _by_jax(weights: Sequence[Weights], batches: Sequence[Batch], dtype: str) -> list[Drawn]:
    with jax.enable_x64(False):
        sides = [JaxSide(w, dtype) for w in weights]
        compiled = sides[0]
        drawn = []
        for side in sides:
            compiled.params = side.params
            drawn += [_drawn(compiled, batch) for batch in batches]
        return drawn


def _drawn(side: JaxSide | TorchSide, batch: Batch) -> Drawn:
    loss, grads = side.loss_and_grads(batch, 1)
    return Drawn({"logits": side.logits(batch.inputs)} | grads, loss)


def _loss(
    dtype: str, batches: Sequence[Batch], ours: Sequence[Drawn], theirs: Sequence[Drawn], truths: Sequence[Drawn]
) -> Result:
    """Each side's loss against the cross-entropy of its own logits, in float64."""
    found, words = [], []
    for name, side in (("JAX", ours), ("PyTorch", theirs)):
        own = [_cross_entropy(d.arrays["logits"], b.targets) for d, b in zip(side, batches, strict=True)]
        found.append(max(abs(d.loss - e) / e for d, e in zip(side, own, strict=True)))
        away = _rms(np.array([d.loss / t.loss - 1 for d, t in _pairs(side, truths)]))
        words.append(f"{name} {found[-1]:.0e}, and {away:.0e} from the truth")
    case = f"{dtype} loss: relative distance from the cross-entropy of its own logits"
    return Result("precision", case, max(found), LOSS_LIMIT, "; ".join(words))


def _cross_entropy(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> float:
    log_p = _log_softmax(logits_BTV.astype(np.float64))
    return -float(np.take_along_axis(log_p, targets_BT[..., None].astype(np.int64), axis=-1).mean())


def _kind(name: str) -> str:
    if name in ("wte.weight", "wpe.weight", "lm_head.weight"):
        return "gradients of embeddings"
    if "ln_" in name or "_norm" in name:
        return "gradients of norms"
    return "gradients of biases" if name.endswith(".bias") else "gradients of matrices"


def _pairs(side: Sequence[Drawn], truths: Sequence[Drawn]) -> Iterator[tuple[Drawn, Drawn]]:
    return zip(side, truths, strict=True)


def _error(found: Drawn, truth: Drawn, name: str) -> float:
    """The relative error, and never zero: its logarithm is taken."""
    return relative_error(found.arrays[name], truth.arrays[name]) + np.finfo(np.float64).eps


def _rms(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.sqrt(np.mean(np.square(values), axis=axis))


def _place(names: Sequence[str], logs: np.ndarray) -> str:
    """The first tensor on the way back that is beyond the limit by itself, or the one that is the furthest."""
    alone = {name: at_least(of_name) for name, of_name in zip(names, logs, strict=True)}
    beyond = [name for name in reversed(names) if alone[name] > LIMIT]
    name = beyond[0] if beyond else max(alone, key=alone.get)
    how = "first beyond it" if beyond else "the most"
    return f"{how} at {places.in_words(name)}, {_in_words(logs[names.index(name)])}"


def _in_words(logs: np.ndarray) -> str:
    ratio, spread = math.exp(np.mean(logs)), np.std(logs, ddof=1) / math.sqrt(len(logs))
    return f"{ratio:.2f} +- {ratio * spread:.2f}"


def _agreement(ours: Sequence[Drawn], theirs: Sequence[Drawn], truths: Sequence[Drawn]) -> str:
    """Next tokens: how often each side's likeliest is the true one, and how far its distribution is from the truth."""
    words = []
    for name, side in (("JAX", ours), ("PyTorch", theirs)):
        agree, divergence = [], []
        for found, truth in _pairs(side, truths):
            a, t = found.arrays["logits"].astype(np.float64), truth.arrays["logits"]
            agree.append((a.argmax(-1) == t.argmax(-1)).mean())
            log_t, log_a = _log_softmax(t), _log_softmax(a)
            divergence.append((np.exp(log_t) * (log_t - log_a)).sum(-1).mean())
        words.append(f"{name} argmax {np.mean(agree):.2%}, KL {np.mean(divergence):.0e}")
    return "; ".join(words)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
