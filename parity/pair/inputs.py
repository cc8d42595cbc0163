"""Inputs that show mistakes, made from one of the user's: other sizes, extremes, padding."""

from collections.abc import Iterator

import numpy as np

from parity.models.model import Inputs


def generate(given: Inputs, seed: int = 0) -> Iterator[tuple[str, Inputs]]:
    """Named variants of the input. Which axes are batch and length is read off the arrays: the first axis that all
    share is the batch, the second of integers and of three axes the length."""
    rng = np.random.default_rng(seed)
    values = [np.asarray(x) for x in given.values()]
    if not values or any(x.ndim == 0 for x in values):
        return
    yield "another draw of the input", given.with_values([_drawn(x, rng) for x in values])
    batch = values[0].shape[0]
    shared = all(x.shape[0] == batch for x in values)
    if shared and batch > 1:
        yield "a batch of one", given.with_values([x[:1] for x in values])
    if shared:
        yield (
            "an odd batch",
            given.with_values([_drawn(np.concatenate([x, x, x])[: 2 * batch + 1], rng) for x in values]),
        )
    lengths = [i for i, x in enumerate(values) if (x.ndim == 2 and x.dtype.kind in "iu") or x.ndim == 3]
    if lengths:
        length = values[lengths[0]].shape[1]
        for name, size in (("a longer input", 2 * length), ("a shorter input", max(1, length // 2)), ("length 1", 1)):
            if size != length:
                yield (
                    name,
                    given.with_values([_of_length(x, size, rng) if i in lengths else x for i, x in enumerate(values)]),
                )
    if any(x.ndim == 4 for x in values):
        yield "an image of odd size", given.with_values([_odd(x, rng) for x in values])
    if any(x.dtype.kind == "f" for x in values):
        yield (
            "values a hundred times as large",
            given.with_values([100 * x if x.dtype.kind == "f" else x for x in values]),
        )
        yield (
            "values a thousandth as large",
            given.with_values([x / 1000 if x.dtype.kind == "f" else x for x in values]),
        )
        yield "zeros", given.with_values([np.zeros_like(x) if x.dtype.kind == "f" else x for x in values])
    if any(x.dtype.kind in "iu" for x in values):
        yield (
            "one token repeated",
            given.with_values([np.full_like(x, x.flat[0]) if x.dtype.kind in "iu" else x for x in values]),
        )


def _drawn(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Like it, elements in another order, and floats at another scale."""
    mixed = rng.permutation(x.ravel()).reshape(x.shape)
    return mixed + rng.standard_normal(x.shape).astype(x.dtype) * (np.std(x) or 1.0) if x.dtype.kind == "f" else mixed


def _of_length(x: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    repeated = np.concatenate([x] * (size // x.shape[1] + 1), axis=1)[:, :size]
    return repeated if x.dtype.kind in "iu" else repeated + rng.standard_normal(repeated.shape)


def _odd(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if x.ndim != 4:
        return x
    # The channel axis, which can't change, is the smallest of the last three.
    channel = 1 + int(np.argmin(x.shape[1:]))
    sizes = [n if i in (0, channel) else n + 1 - n % 2 for i, n in enumerate(x.shape)]
    padded = np.pad(x, [(0, s - n) for s, n in zip(sizes, x.shape, strict=True)], mode="edge")
    return padded + rng.standard_normal(padded.shape)
