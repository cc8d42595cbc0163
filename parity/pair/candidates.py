"""Which tensors, transformed how, could be a given weight of the other model by shape: the usual layouts first."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from parity.pair.naming import parts, pattern
from parity.pair.transforms import Transform

Shape = tuple[int, ...]
_SAME = Transform()
_FUSED = (2, 3, 4)
"""How many tensors people fuse into one: gate and value; q, k and v; the gates of an LSTM."""

# Convolutions: PyTorch's (out, in, *space) to JAX's (*space, in, out); transposed ones have (in, out, *space).
_AXES: dict[int, tuple[tuple[int, ...], ...]] = {
    3: ((2, 1, 0), (2, 0, 1)),
    4: ((2, 3, 1, 0), (2, 3, 0, 1)),
    5: ((2, 3, 4, 1, 0), (2, 3, 4, 0, 1)),
}


def one_to_one(source: Shape, target: Shape) -> Iterator[Transform]:
    """Transforms of a tensor of shape `source` into one of shape `target`."""
    if math.prod(source) != math.prod(target):
        return
    if len(source) == len(target) == 2:
        if source[::-1] == target:
            yield _SAME.then("transpose")
        if source == target:
            yield _SAME
        return
    if len(source) == len(target) and len(source) in _AXES:
        space = tuple(range(len(source) - 2))
        usual = _AXES[len(source)]
        fitting = [a for a in usual if tuple(source[i] for i in a) == target]
        for axes in fitting:
            yield _SAME.then("permute", *axes)
        if source == target:
            yield _SAME
        for axes in fitting:
            yield _SAME.then("permute", *axes).then("flip", *space)
        for axes in itertools.permutations(range(len(source))):
            if axes not in usual and axes != tuple(range(len(axes))) and tuple(source[i] for i in axes) == target:
                yield _SAME.then("permute", *axes)
        if not fitting:
            yield _SAME.then("reshape", *target)
        return
    if source == target:
        yield _SAME
        return
    if len(source) == 2:
        yield _SAME.then("transpose").then("reshape", *target)
    yield _SAME.then("reshape", *target)


def part_of(source: Shape, target: Shape) -> Iterator[Transform]:
    """`target` as one of several tensors that `source` holds fused."""
    size = math.prod(target)
    if not size or math.prod(source) % size:
        return
    count = math.prod(source) // size
    if count not in _FUSED:
        return
    for axis in range(min(len(source), 2)):
        if source[axis] % count:
            continue
        shape = tuple(n // count if i == axis else n for i, n in enumerate(source))
        for number in range(count):
            for after in one_to_one(shape, target):
                yield Transform((("chunk", (number, count, axis)), *after.steps))
    width = target[-1] if len(target) in (2, 3) else 0
    if width and source[0] % (count * width) == 0 and source[0] // (count * width) > 1:
        shape = (source[0] // count, *source[1:])
        for number in range(count):
            for after in one_to_one(shape, target):
                yield Transform((("interleaved", (number, count, width)), *after.steps))


def padded(source: Shape, target: Shape) -> Iterator[Transform]:
    """Rows of zeros at the end: a vocabulary of a rounder size, at most 127 rows more or a quarter."""
    if (
        source
        and len(source) == len(target)
        and source[1:] == target[1:]
        and 0 < target[0] - source[0] <= max(127 if source[0] > 127 else 0, source[0] // 4)
    ):
        yield _SAME.then("pad", target[0] - source[0])


def groups(shapes: Mapping[str, Shape]) -> list[tuple[str, ...]]:
    """Tensors that the other model may hold as one: siblings of one module, the same tensor of every expert."""
    found: dict[tuple[str, ...], None] = {}
    siblings, series = defaultdict(list), defaultdict(list)
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        siblings[module.rpartition(".")[0], leaf].append(name)
        siblings[module, _without_suffix(leaf)].append(name)
        for i, part in enumerate(name.split(".")):
            if part.isdigit():
                series[i, ".".join("*" if j == i else p for j, p in enumerate(name.split(".")))].append(name)
    for names in siblings.values():
        for count in (2, 3):
            for start in range(len(names) - count + 1):
                chosen = tuple(names[start : start + count])
                if len({shapes[n][1:] for n in chosen}) == 1:
                    found[chosen] = None
    for names in series.values():
        if len(names) > 1 and len({shapes[n] for n in names}) == 1:
            found[tuple(names)] = None
    return list(found)


def _without_suffix(leaf: str) -> str:
    """The biases of PyTorch's recurrent layers: bias_ih_l0 and bias_hh_l0 belong together."""
    return leaf.replace("_ih", "").replace("_hh", "")


def of_group(names: Sequence[str], shapes: Mapping[str, Shape], target: Shape) -> Iterator[Transform]:
    """Several tensors as one: concatenated, stacked, or (biases) added."""
    first = shapes[names[0]]
    size = sum(math.prod(shapes[n]) for n in names)
    if size == math.prod(target):
        rows = sum(shapes[n][0] for n in names) if first else 0
        if first:
            for after in one_to_one((rows, *first[1:]), target):
                yield Transform((("concat", (0,)), *after.steps))
        if target and target[0] == len(names):
            for after in _in_every_row(first, target[1:]):
                yield Transform((("stack", (0,)), *after))
    if len(names) == 2 and first == shapes[names[1]] and len(first) == 1 and _are_biases(names):
        whole = [after.steps for after in one_to_one(first, target)] + [a.steps for a in part_of(first, target)]
        if first == target and _of_gru(names, shapes):
            yield Transform((("add_first", (2, 3)),))
        for after in whole:
            yield Transform((("add", ()), *after))


def _in_every_row(source: Shape, target: Shape) -> Iterator[tuple]:
    if source == target:
        yield ()
    if len(source) == 2 and source[::-1] == target:
        yield (("permute", (0, 2, 1)),)


def _of_gru(names: Sequence[str], shapes: Mapping[str, Shape]) -> bool:
    """Whether these are the biases of a GRU of PyTorch, whose third gate doesn't add them."""
    hidden = [shapes.get(n.replace("bias", "weight"), ()) for n in names if "_hh" in n]
    return len(hidden) == 1 and len(hidden[0]) == 2 and hidden[0][0] == 3 * hidden[0][1]


def _are_biases(names: Sequence[str]) -> bool:
    return all("bias" in parts(n)[0] for n in names) and pattern(names[0]) != pattern(names[1])
