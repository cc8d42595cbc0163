"""Recording a function whose weights aren't known: it has them in a closure, in whichever framework."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.models.model import Inputs, Recording
from parity.models.opening import open_model


def is_plain_function(given: Any) -> bool:
    """Whether it is a function of inputs alone, and not a model or something that makes one."""
    return inspect.isroutine(given) and bool(inspect.signature(given).parameters)


def record(function: Callable[[np.ndarray], Any], inputs: np.ndarray) -> Recording | None:
    """Every value that it computes, in float64 though its weights are narrower. None if it computes with neither
    framework, or can't be followed."""
    if "torch" in sys.modules:
        from parity.models.torch_model import record_function

        if (recording := record_function(function, inputs)) is not None:
            return recording
    if "jax" not in sys.modules:
        return None
    try:
        model = open_model((lambda _, x: function(x), {}), "function")
        return model.record({}, Inputs.of(inputs))
    except Exception:  # the user's own code; that it can't be traced is no difference
        return None
