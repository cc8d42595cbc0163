"""Check `precision`: in float32 and bfloat16 JAX is no further from the float64 truth than PyTorch is.

Two right programs differ in these dtypes, and comparing them with each other says little. Compared with the truth each
has an error, and the two errors must be of one size.
"""

import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_core.batches import Batch
from parity.gradients import uneven_batch
from parity.sides import JaxSide, TorchSide
from parity.subjects import random_weights
from parity.suite import Result, Subject

# JAX's error over PyTorch's, the geometric mean over seeds and tensors of the root mean square errors. Orders of
# summation differ; a lost digit is a factor of ten, the fast variance of layer norm up to 29.
LIMIT = 1.5


def check(subject: Subject) -> Iterator[Result]:
    batch = uneven_batch(subject)
    subjects = [subject.weights]
    if subject.weights.source.startswith("random"):
        subjects += [random_weights(subject.weights.config, seed) for seed in subject.at((), (1, 2))]
    truths = [_measure(TorchSide(weights), batch) for weights in subjects]
    for dtype in ("float32", "bfloat16"):
        with jax.enable_x64(False):
            ours = [_measure(JaxSide(weights, dtype), batch) for weights in subjects]
        theirs = [_measure(TorchSide(weights, dtype), batch) for weights in subjects]
        for number, what in ((0, "logits"), (1, "gradients")):
            pairs = [
                (relative_error(a[number][n], t[number][n]), relative_error(b[number][n], t[number][n]))
                for a, b, t in zip(ours, theirs, truths, strict=True)
                for n in t[number]
            ]
            ratio = math.exp(np.mean([math.log(a / b) for a, b in pairs if a > 0 and b > 0]))
            a, b = (math.sqrt(np.mean(np.square(errors))) for errors in zip(*pairs, strict=True))
            case = f"{dtype} {what}: JAX's error over PyTorch's, {len(subjects)} sets of weights"
            where = f"relative errors {a:.1e} and {b:.1e}; {_agreement(ours, theirs, truths) if number == 0 else ''}"
            if dtype == "float32" and jax.default_backend() != "cpu":
                where += f"; with TF32 JAX's would be {_tf32_error(subjects, batch, truths, number):.1e}"
            subject.evidence[f"precision {dtype} {what}"] = pairs
            yield Result("precision", case, ratio, LIMIT, where.removesuffix("; "))
    with jax.enable_x64(False):
        found = len(re.findall(r"f64", _program(subject, batch)))
    case = "float64 values in JAX's float32 training program"
    yield Result("precision", case, float(found), 0.0, "residual stream: float32 in both frameworks and both dtypes")


def _measure(side: JaxSide | TorchSide, batch: Batch) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    grads = side.loss_and_grads(batch, 1)[1]
    return {"logits": side.logits(batch.inputs)}, grads


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square error over the truth's root mean square."""
    truth = truth.astype(np.float64)
    return float(np.sqrt(np.mean((value.astype(np.float64) - truth) ** 2) / np.mean(truth**2)))


def _tf32_error(subjects: list, batch: Batch, truths: list, number: int) -> float:
    """What JAX's default, products of float32 in TF32, costs on this accelerator."""
    with jax.enable_x64(False), jax.default_matmul_precision("default"):
        found = [_measure(JaxSide(weights, "float32"), batch) for weights in subjects]
    errors = [relative_error(a[number][n], t[number][n]) for a, t in zip(found, truths, strict=True) for n in t[number]]
    return math.sqrt(np.mean(np.square(errors)))


def _agreement(ours: list, theirs: list, truths: list) -> str:
    """Next tokens: how often each side's likeliest is the true one, and how far its distribution is from the truth."""
    words = []
    for name, side in (("JAX", ours), ("PyTorch", theirs)):
        agree, divergence = [], []
        for (found, _), (truth, _) in zip(side, truths, strict=True):
            a, t = found["logits"].astype(np.float64), truth["logits"]
            agree.append((a.argmax(-1) == t.argmax(-1)).mean())
            log_t, log_a = _log_softmax(t), _log_softmax(a)
            divergence.append((np.exp(log_t) * (log_t - log_a)).sum(-1).mean())
        words.append(f"{name} argmax {np.mean(agree):.2%}, KL {np.mean(divergence):.0e}")
    return "; ".join(words)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _program(subject: Subject, batch: Batch) -> str:
    from gpt2_jax.train_step import loss_and_grads

    side = JaxSide(subject.weights, "float32")
    parts = [jnp.asarray(x)[None] for x in batch]
    return str(jax.make_jaxpr(lambda p, i, t: loss_and_grads(side.definition, p, i, t))(side.params, *parts))
