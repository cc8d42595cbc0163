"""Check `precision`: in float32 and bfloat16 the candidate is no further from the float64 truth than the reference is.

Two right programs differ in these dtypes, and comparing them with each other says little. Compared with the truth each
has an error, and the two errors must be of one size. What so small a model can't show, the traced program does: which
of its operations are in which dtype.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np

from gpt2_core.config import ModelConfig, TrainConfig
from gpt2_core.data.batches import Batch
from gpt2_core.weights import Weights
from parity.engine import dataflow
from parity.engine.adapter import lacking
from parity.engine.evidence import Errors
from parity.engine.precision import at_least, ratio_in_words, relative_error, rms
from parity.engine.results import Result, Skipped
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import DTYPES, GRADIENTS, PROGRAM, STEP_PROGRAM, Adapter, Arrays
from parity.gpt2.cases import Case, random_weights
from parity.gpt2.checks import variants
from parity.gpt2.checks.gradients import uneven_batch
from parity.gpt2.naming import in_words

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
# What a mesh does to a parameter before it is used.
_MOVED = dataflow.LAYOUT | {"sharding_constraint"}
_ARITHMETIC = frozenset({"add", "add_any", "div", "integer_pow", "mul", "square", "sub"})


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What an adapter gives for one sequence: gradients by canonical name, "logits", and the loss."""

    arrays: Arrays
    loss: float


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    if case.runs("dtypes"):
        yield from _dtypes(case, candidate, reference)
    if not case.runs("errors"):
        return
    if skipped := lacking("precision", "errors of gradients", (candidate, GRADIENTS), (reference, GRADIENTS)):
        yield skipped
    else:
        yield from _errors(case, candidate, reference)


def _dtypes(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    """What is computed, exchanged and kept in which dtype."""
    if skipped := lacking("precision", "dtypes of the traced program", (candidate, PROGRAM)):
        yield skipped
    else:
        yield from programs(case, candidate)
        yield from _bfloat16_program(_with_every_option(case), candidate, "unrolled")
    if skipped := lacking("precision", "dtypes of what is exchanged", (candidate, STEP_PROGRAM)):
        yield skipped
    else:
        yield from _exchanges(case, candidate)
    if skipped := lacking("precision", "dtypes of the residual stream", (candidate, DTYPES), (reference, DTYPES)):
        yield skipped
    else:
        yield _residual_stream(case, candidate, reference)


def _errors(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result]:
    """Logits, gradients and the loss in float32 and bfloat16, against the float64 truth."""
    names = candidate.name, reference.name
    weights = [case.weights]
    if case.weights.source.startswith("random"):
        weights += [random_weights(case.weights.config, seed) for seed in case.at((), (1, 2))]
    batches = sequences(case, case.at(8, 8, 16))
    truths = drawn(reference, weights, batches, "float64")
    for dtype in ("float32", "bfloat16"):
        ours, theirs = drawn(candidate, weights, batches, dtype), drawn(reference, weights, batches, dtype)
        tf32 = None
        if dtype == "float32" and jax.default_backend() != "cpu":
            # What JAX's default, products of float32 in TF32, costs on this accelerator.
            with jax.default_matmul_precision("default"):
                tf32 = drawn(candidate, weights, batches, dtype)
        yield from compare(case, names, dtype, ours, theirs, truths, tf32)
        yield compare_losses(names, dtype, batches * len(weights), ours, theirs, truths)


def compare(
    case: Case,
    names: tuple[str, str],
    dtype: str,
    ours: Sequence[Drawn],
    theirs: Sequence[Drawn],
    truths: Sequence[Drawn],
    tf32: Sequence[Drawn] | None = None,
) -> Iterator[Result]:
    """A case for the logits and one for each kind of gradient, over the sequences drawn: `at_least` of their ratios.
    `names` are those of the candidate and the reference."""
    kinds: dict[str, list[str]] = {"logits": ["logits"]}
    for name in list(truths[0].arrays)[1:]:
        kinds.setdefault(_kind(name), []).append(name)
    for kind, tensors in kinds.items():
        a, b = (np.array([[_error(d, t, n) for d, t in _pairs(s, truths)] for n in tensors]) for s in (ours, theirs))
        logs = np.log(a / b)
        where = f"{_first(tensors, logs)}: {ratio_in_words(logs.mean(axis=0))}, errors {rms(a):.1e} and {rms(b):.1e}"
        if kind == "logits":
            where += f"; {_agreement(names, ours, theirs, truths)}"
        if tf32 is not None:
            found = np.array([[_error(d, t, n) for d, t in _pairs(tf32, truths)] for n in tensors])
            where += f"; with TF32 {names[0]}'s would be {rms(found):.1e}"
        case.evidence[f"precision {dtype} {kind}"] = Errors(list(zip(rms(a, axis=1), rms(b, axis=1), strict=True)))
        title = f"{dtype} {kind}: {names[0]}'s error over {names[1]}'s is at least, by {logs.shape[1]} sequences"
        yield Result("precision", title, at_least(logs.mean(axis=0)), limits.ERROR_RATIO, where)


def programs(case: Case, candidate: Adapter) -> Iterator[Result]:
    """What the candidate's traced training programs compute in which dtype, whatever the sizes."""
    with jax.enable_x64(False):
        program = candidate.make(case.weights, "float32").program(uneven_batch(case))
        other = [v for v in program.values() if v.is_float and v.dtype != np.float32]
        yield _none("float32 program: values in another dtype", other)
        full = (jax.lax.Precision.HIGHEST,) * 2
        products = [o for o in program.operations if o.primitive == "dot_general" and o.params["precision"] != full]
        yield _none("float32 program: products that may be done in TF32", products)

    every = list(EXECUTIONS)
    for name in case.at(every[:1], every, prove=every[:2]):
        yield from _bfloat16_program(case, candidate, name)


def _with_every_option(case: Case) -> Case:
    """A small model with the architectural options that the case's may not have."""
    config = ModelConfig(
        n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257, **variants.OPTIONS["all at once"]
    )
    return dataclasses.replace(case, weights=random_weights(config), tokens=case.tokens % config.vocab_size)


def _bfloat16_program(case: Case, candidate: Adapter, execution: str) -> Iterator[Result]:
    config = case.weights.config
    with jax.enable_x64(False):
        program = candidate.make(case.weights, "bfloat16").program(uneven_batch(case), **EXECUTIONS[execution])
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
    yield _none(f"{name}: norms' weights and what is looked up, in bfloat16", _narrowed_parameters(program, config))
    products = [o for o in program.operations if o.primitive == "add" and all(map(_is_narrow_product, o.operands))]
    yield _none(f"{name}: sums of matrix products that are rounded to bfloat16 first", products)
    rows = [o for o in program.operations if o.primitive == "reduce_sum" and _is_over_features(o)]
    found = [v for o in rows for v in dataflow.before(o.operands[0], dataflow.LAYOUT) if _is_narrow_result(v)]
    yield _none(f"{name}: sums over features of what was computed in bfloat16", found)
    found = _narrow(program.outputs[1:], dataflow.ELEMENTWISE)
    yield _none(f"{name}: gradients of parameters, from the sum that makes them on, in bfloat16", found)


def _exchanges(case: Case, candidate: Adapter) -> Iterator[Result | Skipped]:
    """What devices exchange in a step of bfloat16, in the dtype that was asked for: scalars are float32 always."""
    mesh, there = "data=2,fsdp=2", candidate.devices()
    if there < 4:
        yield Skipped("precision", f"dtypes of what is exchanged: needs 4 devices and there are {there}")
        return
    for asked in case.at(("float32",), ("float32", "bfloat16")):
        config = TrainConfig(
            model=case.weights.config,
            batch_size=4,
            precision="bfloat16",
            mesh=mesh,
            attention="xla",
            gradient_exchange=asked,
        )
        with jax.enable_x64(False):
            program = candidate.step_program(config)
        if asked == "float32":
            found = _narrowed_parameters(program, case.weights.config)
            yield _none(f"bfloat16 step on {mesh}: norms' weights and what is looked up, in bfloat16", found)
        sent = [v for o in program.operations if o.primitive in _EXCHANGES for v in o.operands if v.shape]
        other = [v for v in sent if np.dtype(v.dtype).name != asked]
        title = f"gradients exchanged in another dtype than {asked}, of {len(sent)} arrays"
        # Nothing exchanged at all would be as wrong.
        count = float(len(other) if sent else 1)
        yield Result("precision", title, count, limits.NONE, f"first {other[0]}" if other else "")


def _narrowed_parameters(program: dataflow.Graph, config: ModelConfig) -> list[dataflow.Value]:
    """Narrow values that the weights of norms become, or that an embedding is looked up in: neither is multiplied by a
    matrix. Parameters are the program's first inputs, in the order of their names."""
    parameters = zip(sorted(config.parameter_shapes), program.inputs, strict=False)
    norms = [value for parameter, value in parameters if _kind(parameter) == "gradients of norms"]
    used = dataflow.after(program, norms, _MOVED)
    gathers = [o for o in program.operations if o.primitive == "gather" and o.results[0].is_float]
    tables = [v for o in gathers for v in dataflow.before(o.operands[0], _MOVED)]
    return [v for v in (*used, *tables) if v.is_narrow]


def _is_over_features(operation: dataflow.Operation) -> bool:
    """Whether it sums over the last axis, as a norm or the gradient of a softmax does."""
    return len(operation.operands[0].shape) - 1 in operation.params["axes"]


def _is_narrow_result(value: dataflow.Value) -> bool:
    return value.is_narrow and any(o.primitive in _ARITHMETIC for o in value.makers)


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
    title = f"{name}: values of the residual stream in bfloat16, or lost"
    where = f"first {narrow[0]}" if narrow else f"{len(additions)} additions, all in float32"
    return Result("precision", title, float(len(narrow) + missing), limits.NONE, where)


def _is_narrow_product(value: dataflow.Value) -> bool:
    made = [o for v in dataflow.before(value, dataflow.LAYOUT | {"add"}) if v.is_narrow for o in v.makers]
    return value.is_narrow and any(o.primitive == "dot_general" for o in made)


def _narrow(values: Collection[dataflow.Value], through: Collection[str]) -> list[dataflow.Value]:
    return [v for value in values for v in dataflow.before(value, through) if v.is_narrow]


def _none(title: str, found: Sequence[dataflow.Value | dataflow.Operation]) -> Result:
    return Result("precision", title, float(len(found)), limits.NONE, f"first {found[0]}" if found else "")


def _residual_stream(case: Case, candidate: Adapter, reference: Adapter) -> Result:
    """Looked at where it is captured, in both."""
    tokens_BT = case.tokens[: case.weights.config.block_size][None]
    seen: list[set[str]] = [set(), set()]
    for dtype in ("float32", "bfloat16"):
        for dtypes, adapter in zip(seen, (candidate, reference), strict=True):
            with jax.enable_x64(False):
                found = adapter.make(case.weights, dtype).dtypes(tokens_BT)
            dtypes |= {d for name, d in found.items() if name == "embeddings" or ".residual_" in name}
    names = candidate.name, reference.name
    where = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in zip(names, seen, strict=True))
    others = set.union(*seen) - {"float32"}
    title = "dtypes of the residual stream besides float32, in both dtypes"
    return Result("precision", title, float(len(others)), limits.NONE, where)


def sequences(case: Case, number: int) -> list[Batch]:
    """Sequences from all over the text."""
    T = case.weights.config.block_size
    starts = np.linspace(0, len(case.tokens) - T - 1, number).astype(int)
    windows = [case.tokens[start : start + T + 1][None] for start in starts]
    return [Batch(np.ascontiguousarray(w[:, :-1]), np.ascontiguousarray(w[:, 1:])) for w in windows]


def drawn(adapter: Adapter, weights: Sequence[Weights], batches: Sequence[Batch], dtype: str) -> list[Drawn]:
    """What the implementation gives for each of the weights, all of one architecture, and each batch."""
    with jax.enable_x64(dtype == "float64"):
        found, of_weights = [], adapter
        for w in weights:
            of_weights = of_weights.make(w, dtype)  # made of the last, so that what is compiled is shared
            for batch in batches:
                loss, grads = of_weights.loss_and_grads(batch, 1)
                found.append(Drawn({"logits": of_weights.logits(batch.inputs)} | grads, loss))
        return found


def compare_losses(
    names: tuple[str, str],
    dtype: str,
    batches: Sequence[Batch],
    ours: Sequence[Drawn],
    theirs: Sequence[Drawn],
    truths: Sequence[Drawn],
) -> Result:
    """Each one's loss against the cross-entropy of its own logits, in float64."""
    found, words = [], []
    for name, of_adapter in zip(names, (ours, theirs), strict=True):
        own = [_cross_entropy(d.arrays["logits"], b.targets) for d, b in zip(of_adapter, batches, strict=True)]
        found.append(max(abs(d.loss - e) / e for d, e in zip(of_adapter, own, strict=True)))
        away = rms(np.array([d.loss / t.loss - 1 for d, t in _pairs(of_adapter, truths)]))
        words.append(f"{name} {found[-1]:.0e}, and {away:.0e} from the truth")
    title = f"{dtype} loss: relative distance from the cross-entropy of its own logits"
    return Result("precision", title, max(found), limits.LOSS_OF_LOGITS, "; ".join(words))


def _cross_entropy(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> float:
    log_p = _log_softmax(logits_BTV.astype(np.float64))
    return -float(np.take_along_axis(log_p, targets_BT[..., None].astype(np.int64), axis=-1).mean())


def _kind(name: str) -> str:
    if name in ("wte.weight", "wpe.weight", "lm_head.weight"):
        return "gradients of embeddings"
    if "ln_" in name or "_norm" in name:
        return "gradients of norms"
    return "gradients of biases" if name.endswith(".bias") else "gradients of matrices"


def _pairs(found: Sequence[Drawn], truths: Sequence[Drawn]) -> Iterator[tuple[Drawn, Drawn]]:
    return zip(found, truths, strict=True)


def _error(found: Drawn, truth: Drawn, name: str) -> float:
    """The relative error, and never zero: its logarithm is taken."""
    return relative_error(found.arrays[name], truth.arrays[name]) + np.finfo(np.float64).eps


def _first(names: Sequence[str], logs: np.ndarray) -> str:
    """The first tensor on the way back that is beyond the limit by itself, or the one that is the furthest."""
    alone = {name: at_least(of_name) for name, of_name in zip(names, logs, strict=True)}
    beyond = [name for name in reversed(names) if alone[name] > limits.ERROR_RATIO]
    name = beyond[0] if beyond else max(alone, key=alone.get)
    how = "first beyond it" if beyond else "the most"
    return f"{how} at {in_words(name)}, {ratio_in_words(logs[names.index(name)])}"


def _agreement(names: tuple[str, str], ours: Sequence[Drawn], theirs: Sequence[Drawn], truths: Sequence[Drawn]) -> str:
    """Next tokens: how often each one's likeliest is the true one, and how far its distribution is from the truth."""
    words = []
    for name, of_adapter in zip(names, (ours, theirs), strict=True):
        agree, divergences = [], []
        for found, truth in _pairs(of_adapter, truths):
            a, t = found.arrays["logits"].astype(np.float64), truth.arrays["logits"]
            agree.append((a.argmax(-1) == t.argmax(-1)).mean())
            log_t, log_a = _log_softmax(t), _log_softmax(a)
            divergences.append((np.exp(log_t) * (log_t - log_a)).sum(-1).mean())
        words.append(f"{name} argmax {np.mean(agree):.2%}, KL {np.mean(divergences):.0e}")
    return "; ".join(words)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
