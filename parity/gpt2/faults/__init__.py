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
from parity.gpt2.suite import CHECKS, in_words, load

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")  # which registers its faults

# As reports list them: in the order of the checks that catch them.
FAULTS = tuple(sorted(REGISTERED.values(), key=lambda fault: CHECKS.index(fault.check)))


def case_of(fault: Fault | None = None) -> Case:
    """The smallest thing on which the fault can show."""
    weights = random_weights(fault.model if fault else MODEL)
    if fault is not None:
        arrays = {n: fault.prepare(n, a).astype(np.float32) for n, a in weights.arrays.items()}
        weights = dataclasses.replace(weights, arrays=arrays)
    part = fault.part if fault else None
    return Case(weights, real_text(weights, 20_000), level="prove", steps=12, part=part)


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
