"""Verdicts on precision: whether one program's error against the truth is larger than another's, and not by chance.

Two right programs differ in a narrow dtype, and comparing them with each other says little. Compared with the truth
each has an error, and the two errors must be of one size.
"""

import math

import numpy as np
from scipy import special

# How often at most a case whose true ratio is at its limit exceeds it by chance.
FALSE_ALARMS = 1e-3


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square error over the truth's root mean square."""
    truth = truth.astype(np.float64)
    return float(np.sqrt(np.mean((value.astype(np.float64) - truth) ** 2) / np.mean(truth**2)))


def at_least(logs: np.ndarray) -> float:
    """The ratio that the mean of these logarithms of ratios proves: the lower end of its t interval (Student 1908),
    which lies above the true one in FALSE_ALARMS of all cases."""
    spread = np.std(logs, ddof=1) / math.sqrt(len(logs))
    return float(np.exp(np.mean(logs) - special.stdtrit(len(logs) - 1, 1 - FALSE_ALARMS) * spread))


def ratio_in_words(logs: np.ndarray) -> str:
    """'0.95 +- 0.03': the mean of these logarithms of ratios and its standard error."""
    ratio, spread = math.exp(np.mean(logs)), np.std(logs, ddof=1) / math.sqrt(len(logs))
    return f"{ratio:.2f} +- {ratio * spread:.2f}"


def rms(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.sqrt(np.mean(np.square(values), axis=axis))
