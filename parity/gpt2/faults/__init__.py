"""Negative controls: real mistakes, each a small patch of one side, and where each must be found.

`python parity/compare.py --prove` injects them one at a time. A suite that lets one of them pass would let a port with
that mistake pass. They are in the files of this folder by subject; `parity.gpt2.faults.fault` says how to write one.
"""

import dataclasses
import importlib
import math
import pkgutil

import numpy as np

from parity.engine.compiling import compiled_quickly
from parity.engine.processes import on_one_thread
from parity.engine.results import Result
from parity.gpt2.adapters import both
from parity.gpt2.cases import Case, random_weights, real_text
from parity.gpt2.faults.fault import MODEL, REGISTERED, Fault, Verdict
from parity.gpt2.suite import in_words, load

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")  # which registers its faults

# Reports list these in the order in which they were added; later ones follow, file by file.
_FIRST = (
    "erf GELU",
    "sigmoid GELU",
    "epsilon 1e-6",
    "unscaled attention",
    "scale by n_embd",
    "softmax over the queries",
    "mask sees the next token",
    "mask hides the token itself",
    "additive mask of -1e4",
    "queries and keys swapped",
    "heads interleaved wrongly",
    "missing projection bias",
    "transposed square matrix",
    "untied head",
    "head tied but not updated",
    "positions from one",
    "embeddings scaled by sqrt(n_embd)",
    "missing ln_f",
    "post-norm",
    "residual from after the norm",
    "loss over targets shifted twice",
    "mean of means",
    "padded vocabulary inside the softmax",
    "decay on biases and norms",
    "no decay on embeddings",
    "L2 instead of decoupled decay",
    "no bias correction",
    "epsilon inside the root",
    "betas swapped",
    "clipping after the optimizer",
    "clipping per tensor",
    "clipping without PyTorch's 1e-6",
    "learning rate one step early",
    "learning rate one step late",
    "warmup from zero",
    "cosine to zero",
    "gradient sum over shards",
    "dropout without its scale",
    "dropout in evaluation",
    "one dropout key for everything",
    "KV cache off by one",
    "stale KV cache",
    "top-p without the crossing token",
    "temperature after the filters",
    "filtered tokens leak",
    "TF32 instead of float32",
    "layer norm in bfloat16",
    "layer norm's fast variance",
    "residual stream in bfloat16",
    "attention's softmax in bfloat16",
    "logits in bfloat16",
    "gradients of weights rounded to bfloat16",
    "gradients accumulated in bfloat16",
    "what rematerialisation keeps in bfloat16",
    "gradients exchanged as they are computed",
    "a product at JAX's default precision",
    "projections into the residual stream unscaled",
    "rotary pairs mixed up",
    "SwiGLU's gate and value swapped",
    "exact GELU asked for, tanh GELU computed",
    "a mean over every target",
    "a row without a key",
    "a tensor left out by the conversion",
    "logits of the last position only",
    "a schedule that starts again",
    "one mask for every sequence",
    "one mask for all heads",
    "attention's dropout forgotten",
    "the rate kept instead of dropped",
    "masks that depend on the precision",
    "every step seeded alike",
    "uniform weights of the same variance",
    "truncated normal weights",
    "every layer begins alike",
    "PyTorch's own biases",
    "windows left out",
    "validation reads the beginning only",
    "evaluation averages batches",
    "padding counts in the mean",
    "validation on the training text",
    "the model stays in evaluation mode",
    "the last part's loss is logged",
    "the gradient norm is logged after clipping",
    "the optimizer isn't restored",
    "a resumed run begins the text again",
    "a resumed run begins the schedule again",
    "a resumed run keeps what it does again in the log",
    "the best checkpoint is the one with the largest loss",
    "checkpoints are never removed",
    "the same masks at every step",
    "every sample from the same numbers",
    "beta2 written into the code",
    "RMS norm's epsilon written into the code",
    "clipping to a norm of zero",
    "last tokens of a sequence left out of the loss",
    "KV cache grown empty",
    "the last of equal logits",
    "layers in the order of their names",
    "one dropout key for all scanned layers",
    "rotary base of the default in the decoder",
    "float64 weights through float32",
    "a file's layers in the order of their names",
    "layer norm's epsilon not read from config.json",
)

FAULTS = tuple(
    sorted(REGISTERED.values(), key=lambda fault: _FIRST.index(fault.name) if fault.name in _FIRST else len(_FIRST))
)


def case_of(fault: Fault | None = None) -> Case:
    """The smallest thing on which the fault can show."""
    weights = random_weights(fault.model if fault else MODEL)
    if fault is not None:
        arrays = {n: fault.prepare(n, a).astype(np.float32) for n, a in weights.arrays.items()}
        weights = dataclasses.replace(weights, arrays=arrays)
    return Case(weights, real_text(weights, 20_000), level="quick", steps=12)


def judge(fault: Fault, device: str = "cpu") -> Verdict:
    """Inject the fault and run the check that should catch it, PyTorch on this device."""
    failed, placed = [], []
    try:
        case = case_of(fault)
        with fault.patch(), compiled_quickly(), on_one_thread():
            for result in load(fault.check)(case, *both(case.weights, device)):
                if isinstance(result, Result) and not result.passed:
                    failed.append(result)
                    if fault.place in f"{result.case} {result.where}":
                        placed.append(result)
                        break  # what is found is found, and each further case is compiled for
    except Exception as error:
        # The code that the fault was written for is no longer what it was.
        return Verdict(fault, False, False, 0.0, f"can't be planted: {in_words(error)}")
    shown = (placed or failed or [None])[0]
    return Verdict(
        fault,
        caught=bool(failed),
        in_place=bool(placed),
        orders=_orders(shown) if shown else 0.0,
        where=f"{shown.case}: {shown.where}".removesuffix(": ") if shown else "",
    )


def _orders(result: Result) -> float:
    if not math.isfinite(result.measured):
        return math.inf
    # Counts have a limit of zero: one too many is as plain as it can be.
    return math.log10(result.measured / result.limit) if result.limit > 0 else math.inf
