"""What checks leave for the report to draw, by a name that begins with the check's."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Curves:
    """Losses of both, step by step, and the reference's own from weights that are changed in their last digit."""

    candidate: np.ndarray
    reference: np.ndarray
    nudged: np.ndarray
    limit: float
    """Of the difference between the first two."""


@dataclasses.dataclass(frozen=True)
class Depth:
    """The relative difference of every value, in the order in which they are computed."""

    title: str
    differences: list[tuple[str, float]]
    limit: float


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of each tensor of one kind, the candidate's and the reference's error against the truth."""

    points: list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Texts:
    """What both generated after a prompt."""

    prompt: str
    candidate: str
    reference: str


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Rows of options that were run together, and how many pairs of options have met in them."""

    rows: list[dict[str, str]]
    covered: int
    pairs: int


Evidence = Curves | Depth | Errors | Texts | Coverage
