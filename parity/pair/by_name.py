"""A mapping by names and shapes alone, for two models of which neither has a program to follow values in."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from parity.models.model import Weight
from parity.pair.mapping import Row
from parity.pair.naming import alike
from parity.pair.transforms import Transform


def rows_by_name(source: Mapping[str, Weight], target: Mapping[str, Weight], ignore: Sequence[str]) -> list[Row]:
    """Tensors of equal shape, each once, whose names are most alike; none is verified by values."""
    mine = [n for n in source if n not in ignore]
    theirs = [n for n in target if n not in ignore]
    cost = np.full((len(theirs), len(mine)), 100.0)
    for i, t in enumerate(theirs):
        for j, s in enumerate(mine):
            if target[t].shape == source[s].shape:
                cost[i, j] = -alike(t, s) + 0.01 * abs(i / max(1, len(theirs)) - j / max(1, len(mine)))
    pairs = zip(*linear_sum_assignment(cost), strict=True)
    return [Row((mine[j],), Transform(), theirs[i], verified=mine[j] == theirs[i]) for i, j in pairs if cost[i, j] < 50]
