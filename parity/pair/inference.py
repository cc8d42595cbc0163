"""Inferring the mapping of weights: by names, shapes and order of use, and by following values.

The source has run, and every value that it computed is known. The target's program is evaluated operation by operation;
where it needs a weight, the source's tensors that fit by shape are tried, the most likely first, and one is accepted
when a value that the target computes with it occurs in the source. Where none does, names decide, and the source's
value is put in the place of the target's, so that what follows can be told apart from what went wrong.
"""

import dataclasses
import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from parity.models.jax_model import LAYOUT
from parity.models.model import Arrays, Recording, Weight
from parity.models.program import Constant, Operation, Program, evaluate
from parity.pair import candidates, layouts
from parity.pair.fingerprints import NEAR, Index, evidence
from parity.pair.mapping import Row
from parity.pair.naming import alike, recurrent
from parity.pair.transforms import Transform

MOST_OPERATIONS = 60
"""Of the target's program that follow a weight's first use, until a value that the source has must appear."""
MOST_MATCHES = 12
"""Of values of the source, when a candidate is compared with random numbers."""
MOST_TRIALS = 200
"""Of candidates for one weight."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    source: tuple[str, ...]
    transform: Transform
    likely: float


class Inference:
    """One inference; `rows` are what it found."""

    def __init__(self, recording: Recording, source: dict[str, Weight], weights: Arrays, program: Program,
                 target: dict[str, Weight], inputs: Sequence[np.ndarray], ignore: Sequence[str]) -> None:  # fmt: skip
        self._recording, self._weights, self._program = recording, weights, program
        self._lengths = _lengths(program)
        self._index = Index(evidence(recording, self._lengths))
        self._shapes = {n: weights[n].shape for n, w in source.items() if n not in ignore}
        self._order = {n: i for i, n in enumerate(recording.order_of_use)}
        self._values: dict[int, Any] = dict(zip(program.inputs, inputs, strict=True)) | program.of_constants()
        self._used: Counter[str] = Counter()
        self._taken: set[tuple[tuple[str, ...], Transform]] = set()
        self._forms: dict[tuple, Counter[str]] = defaultdict(Counter)
        self._layouts = layouts.Layouts()
        self._users: dict[int, list[int]] = defaultdict(list)
        for position, operation in enumerate(program.operations):
            for x in operation.inputs:
                if not isinstance(x, Constant):
                    self._users[x].append(position)
        self._kept = [n for n, w in source.items() if w.kept]
        self._groups = candidates.groups({n: s for n, s in self._shapes.items() if n in set(self._kept)})
        self.rows: list[Row] = []
        self._names = frozenset(target)
        self._units = self._find_units(target, ignore)
        self._from_weights = _weight_only(program)
        self._released = _last_needed(program, self._from_weights)
        self._chosen: dict[int, tuple[Candidate, bool, tuple[str, ...]]] = {}
        self._postponed: dict[int, None] = {}
        self._run()
        self._collect(list(target))

    def _find_units(
        self, own: dict[str, Weight], ignore: Sequence[str]
    ) -> dict[int, tuple[str, int | None, tuple[int, ...]]]:
        """Numbers of the values that are unknown weights: whole ones, and each layer's row of one that a scan walks."""
        shapes: dict[int, tuple[str, int | None, tuple[int, ...]]] = {}
        names = list(own)
        target_shapes = self._program_shapes(names)
        for number, name in zip(self._program.weights, names, strict=True):
            if name in ignore:
                self._values[number] = own[name].value
                continue
            users = [self._program.operations[p] for p in self._users[number]]
            if users and all(o.primitive == "row" for o in users):
                for o in users:
                    shapes[o.outputs[0]] = (name, o.params["index"], target_shapes[name][1:])
            else:
                shapes[number] = (name, None, target_shapes[name])
        return shapes

    def _program_shapes(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        return {n: tuple(s) for n, s in zip(names, self._program.weight_shapes, strict=True)}

    # --- Walking the program ---

    def _run(self) -> None:
        for position, operation in enumerate(self._program.operations):
            # What is made of weights alone waits until data needs it: only then do values tell which weights they are.
            if operation.outputs[0] in self._from_weights:
                continue
            if not self._vanishes(operation):
                for x in operation.inputs:
                    if not isinstance(x, Constant):
                        self._resolve(x, position)
                if operation.outputs[0] not in self._values:
                    evaluate(operation, self._values, lifted=True)
            self._learn_layout(operation)
            self._substitute_if_due(operation)
            for x in self._released[position]:
                self._values.pop(x, None)
        for unit in self._postponed:
            if unit not in self._chosen:  # it only ever met zeros
                self._take_by_name(unit, self._candidates(self._units[unit][0], self._units[unit][2]))

    def _resolve(self, x: int, position: int) -> None:
        """Find the weights behind a value that depends on nothing else, and compute it."""
        if x in self._values:
            return
        if x in self._units:
            self._look_ahead(position)
            self._choose(x)
            return
        operation = self._from_weights[x]
        if self._vanishes(operation):
            return
        for source in operation.inputs:
            if not isinstance(source, Constant):
                self._resolve(source, position)
        evaluate(operation, self._values, lifted=True)

    def _vanishes(self, operation: Operation) -> bool:
        """Whether it multiplies an unknown weight by zeros, as in the first step of a recurrent layer. It is computed
        without the weight then: a later use, which depends on it, decides which it is."""
        given = [x for x in operation.inputs if not isinstance(x, Constant)]
        unknown = [x for x in given if x not in self._values]
        known = [self._values[x] for x in given if x in self._values]
        if operation.primitive not in _PRODUCTS or not unknown or not any(map(_is_zero, known)):
            return False
        if any(x not in self._units and x not in self._from_weights for x in unknown):
            return False  # looking ahead: data that isn't computed yet
        trial = _Overlay(self._values)
        for x in unknown:
            self._blank(x, trial)
        evaluate(operation, trial, lifted=True)
        self._values |= {x: trial[x] for x in operation.outputs}
        return True

    def _blank(self, x: int, trial: "_Overlay") -> None:
        """Zeros for an unknown weight, or for what is made of unknown weights."""
        if x in trial:
            return
        if x in self._units:
            self._postponed[x] = None
            trial[x] = np.zeros(self._units[x][2])
            return
        operation = self._from_weights[x]
        for source in operation.inputs:
            if not isinstance(source, Constant):
                self._blank(source, trial)
        evaluate(operation, trial, lifted=True)

    def _look_ahead(self, position: int) -> None:
        """Evaluate what comes next and needs no unknown weight: trials meet it."""
        for operation in self._program.operations[position : position + 4 * MOST_OPERATIONS]:
            if operation.outputs[0] in self._values or operation.outputs[0] in self._units:
                continue
            if all(isinstance(x, Constant) or x in self._values for x in operation.inputs):
                evaluate(operation, self._values, lifted=True)
            else:
                self._vanishes(operation)

    def _choose(self, unit: int) -> None:
        name, _, shape = self._units[unit]
        ranked = self._candidates(name, shape)
        found: list[tuple[Candidate, bool, int]] = []
        if ranked and ranked[0].transform.adds and recurrent(name, *_of(ranked[0]), self._names) > 1.0:
            # One term of the sum agrees with a value of its own; the sum is a value only with the gate's other product.
            self._take(unit, ranked[0], False, ())
            return
        # In a loop other tensors' products may occur in the source as well, step by step: all that fit are tried then.
        in_loop = len(self._users[unit]) in self._lengths
        for candidate in ranked[:MOST_TRIALS]:
            if found and not in_loop and candidate.likely < found[0][0].likely - 1.0:
                break
            matched, same_order = self._agreeing(unit, self._made(candidate), len(candidate.source))
            if matched:
                found.append((candidate, same_order and len(matched) >= len(candidate.source), min(matched)))
                if len(found) == 1 and self._says_nothing(unit, self._made(candidate)):
                    return  # any tensor agrees: a bias of keys, which has no effect after a softmax
                if len(found) > 3 and len(candidate.source) == 1 and not in_loop:
                    break
        # Of several tensors that are put together, every part must show. Elements must be in their order, which a
        # flipped kernel may change without changing which elements there are. Then the number of values that agree
        # counts (more do with the sum of two biases than with one of them), and how early the first does: later ones,
        # such as a maximum of several parts, may not depend on this tensor.
        if len(found) > 1:
            found.sort(key=lambda f: (not f[1], -self._agreement(unit, f[0]), f[2]))
        if found:
            chosen = found[0][0]
            others = [c for c, _, _ in found[1:] if c.source != chosen.source and c.likely > chosen.likely - 0.05]
            self._take(unit, chosen, True, tuple(" + ".join(c.source) for c in others))
        else:
            self._take_by_name(unit, ranked)

    def _take_by_name(self, unit: int, ranked: list[Candidate]) -> None:
        if not ranked:
            self._values[unit] = np.zeros(self._units[unit][2])
            return
        rivals = [c for c in ranked[1:] if c.source != ranked[0].source and c.likely > ranked[0].likely - 0.05]
        self._take(unit, ranked[0], False, tuple(" + ".join(c.source) for c in rivals[:4]))

    def _agreement(self, unit: int, candidate: Candidate) -> int:
        """How many values agree that are computed with it."""
        return len(self._agreeing(unit, self._made(candidate), MOST_MATCHES)[0])

    def _says_nothing(self, unit: int, tensor: np.ndarray) -> bool:
        """Whether a tensor of random numbers agrees as soon and as often as this one does."""
        name, _, shape = self._units[unit]
        noise = np.random.default_rng(len(name)).standard_normal(shape)
        (with_noise, _), (with_tensor, _) = (self._agreeing(unit, x, MOST_MATCHES) for x in (noise, tensor))
        if len(with_noise) < len(with_tensor) or with_noise[0] > with_tensor[0]:
            return False
        self._values[unit] = np.zeros(shape)
        return True

    def _take(self, unit: int, candidate: Candidate, verified: bool, alternatives: tuple[str, ...]) -> None:
        self._values[unit] = self._made(candidate)
        self._chosen[unit] = (candidate, verified, alternatives)
        name, _, shape = self._units[unit]
        self._forms[self._family(name, len(shape))][candidate.transform.form] += 2 if verified else 1
        self._taken.add((candidate.source, candidate.transform))
        for n in candidate.source:
            self._used[n] += 1

    def _made(self, candidate: Candidate) -> np.ndarray:
        return candidate.transform(*(self._weights[n] for n in candidate.source))

    def _agreeing(self, unit: int, tensor: np.ndarray, parts: int) -> tuple[list[int], bool]:
        """Positions of the operations whose values, computed with this tensor, occur in the source, of so many
        different ones; and whether these values have the source's order of elements, but for axes."""
        trial, matched, same_order = _Overlay(self._values), {}, True
        trial[unit] = tensor
        queue, seen, count = list(self._users[unit]), set(), 0
        heapq.heapify(queue)
        while queue and count < MOST_OPERATIONS:
            position = heapq.heappop(queue)
            if position in seen:
                continue
            seen.add(position)
            operation = self._program.operations[position]
            if any(not isinstance(x, Constant) and x not in trial for x in operation.inputs):
                continue
            if operation.outputs[0] in self._values:
                continue  # known without this weight, because it vanishes there
            if operation.primitive == "row" and operation.outputs[0] in self._units:
                continue
            evaluate(operation, trial, lifted=True)
            count += 1
            for x in operation.outputs:
                if x not in self._from_weights and operation.primitive not in _REPEATS:
                    value = trial[x]
                    for number in self._index.find(value, NEAR)[:1] if isinstance(value, np.ndarray) else ():
                        matched.setdefault((number, value.size), position)
                        theirs = self._recording.values[number]
                        same_order &= theirs.size != value.size or layouts.permutation(theirs, value, 1e-3) is not None
                    if len(matched) >= parts:
                        return list(matched.values()), same_order
                for user in self._users[x]:
                    heapq.heappush(queue, user)
        return list(matched.values()), same_order

    # --- Candidates ---

    def _candidates(self, name: str, shape: tuple[int, ...]) -> list[Candidate]:
        found: list[Candidate] = []
        for source, transform in self._fitting(shape):
            found.append(Candidate(source, transform, self._likely(name, len(shape), source, transform)))
        return sorted(found, key=lambda c: -c.likely)

    def _fitting(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], Transform]]:
        for n, s in self._shapes.items():
            for kind in (candidates.one_to_one, candidates.part_of, candidates.padded):
                for transform in kind(s, shape):
                    yield (n,), transform
        for names in self._groups:
            for transform in candidates.of_group(names, self._shapes, shape):
                yield names, transform

    def _likely(self, name: str, rank: int, source: tuple[str, ...], transform: Transform) -> float:
        """How likely this is right by names, order, what its siblings did and how usual the transform is."""
        names = max(alike(name, n) for n in source) if len(source) == 1 else np.mean([alike(name, n) for n in source])
        unused = -2.0 * any(self._used[n] for n in source) * (not _is_part(transform))
        forms = self._forms[self._family(name, rank)]
        usual = 0.6 * forms[transform.form] / forms.total() if forms else 0.0
        after = np.mean([self._order.get(n, len(self._order)) for n in source])
        expected = len([n for n in self._order if self._used[n]])
        distance = abs(after - expected) / max(1, len(self._order))
        plain = -0.05 * len(transform.steps) - 0.3 * (len(source) > 1) - 0.2 * _is_part(transform)
        taken = -2.0 * ((source, transform) in self._taken)
        rules = self._convention(name, rank, transform) + recurrent(name, source, transform, self._names)
        return float(names + unused + taken + usual - 0.5 * distance + plain + rules)

    def _convention(self, name: str, rank: int, transform: Transform) -> float:
        """Before siblings are known: kernels are transposed, embeddings aren't."""
        leaf = name.rpartition(".")[2].lower()
        if rank == 2 and leaf in ("kernel", "w"):
            return 0.2 * (transform.form.endswith("transpose"))
        return 0.2 * (transform.form == "") if rank == 2 else 0.0

    def _family(self, name: str, rank: int) -> tuple:
        return name.rpartition(".")[2], rank

    # --- Going on after a difference ---

    def _learn_layout(self, operation: Operation) -> None:
        if operation.primitive in LAYOUT:
            return
        for x in operation.outputs:
            value = self._values[x]
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 1:
                for number in self._index.find(value)[:1]:
                    self._layouts.learn(self._recording.values[number], value)

    def _substitute_if_due(self, operation: Operation) -> None:
        """After the first operation that combines an unverified weight with data, go on with the source's value."""
        for x in operation.inputs:
            origin = None if isinstance(x, Constant) else self._unit_behind(x)
            if origin is None or self._chosen.get(origin, (None, True))[1]:
                continue
            candidate = self._chosen[origin][0]
            if len(candidate.source) > 1 or operation.outputs[0] in self._from_weights:
                continue
            value = self._values[operation.outputs[0]]
            for number in _first_uses(self._recording, candidate.source[0]):
                theirs = self._recording.values.get(number)
                if theirs is None or not isinstance(value, np.ndarray) or theirs.size != value.size:
                    continue
                laid_out = self._layouts.apply(theirs, value.shape)
                if laid_out is not None and not np.array_equal(laid_out, value):
                    self._values[operation.outputs[0]] = laid_out
                    return

    def _unit_behind(self, x: int) -> int | None:
        """The weight that this value is, through operations on weights alone."""
        while x not in self._units:
            if x not in self._from_weights:
                return None
            operation = self._from_weights[x]
            sources = [s for s in operation.inputs if not isinstance(s, Constant)]
            if len(sources) != 1:
                return None
            x = sources[0]
        return x

    # --- Results ---

    def _first_use(self, unit: int) -> str:
        """The primitive of the first operation that isn't layout."""
        number = unit
        while users := self._users[number]:
            operation = self._program.operations[users[0]]
            if operation.primitive not in LAYOUT or operation.primitive == "gather":
                return operation.primitive
            number = operation.outputs[0]
        return ""

    def _collect(self, names: list[str]) -> None:
        by_name: dict[str, dict[int | None, int]] = defaultdict(dict)
        for unit in self._chosen:
            name, index, _ = self._units[unit]
            by_name[name][index] = unit
        for name in names:
            rows = by_name.get(name)
            if not rows:
                continue
            if None in rows:
                candidate, verified, alternatives = self._chosen[rows[None]]
                use = self._first_use(rows[None])
                self.rows.append(Row(candidate.source, candidate.transform, name, verified, alternatives, use))
            else:
                self.rows.append(_stacked(name, [self._chosen[rows[i]] for i in sorted(rows)]))


def _stacked(name: str, layers: list[tuple[Candidate, bool, tuple[str, ...]]]) -> Row:
    """A weight of which every layer is a row."""
    transforms = {c.transform for c, _, _ in layers}
    sources = tuple(n for c, _, _ in layers for n in c.source)
    verified = all(v for _, v, _ in layers)
    if len(transforms) == 1 and all(len(c.source) == 1 for c, _, _ in layers):
        return Row(sources, Transform((("each", ()), *transforms.pop().steps)), name, verified)
    return Row(sources, Transform((("stack", (0,)),)), name, False)


def _of(candidate: Candidate) -> tuple[tuple[str, ...], Transform]:
    return candidate.source, candidate.transform


def _is_part(transform: Transform) -> bool:
    return any(kind in ("chunk", "interleaved") for kind, _ in transform.steps)


# Operations whose result has its operand's elements again: no evidence of their own.
_REPEATS = frozenset({"convert_element_type", "copy", "stop_gradient", "optimization_barrier"})


# Whose result is zeros if one operand is.
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "mul"})


def _is_zero(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f" and not x.any()


def _lengths(program: Program) -> frozenset[int]:
    """How many steps the program's loops over data have."""
    alone, rows = _weight_only(program), Counter()
    for operation in program.operations:
        if operation.primitive == "row" and operation.outputs[0] not in alone:
            rows[operation.inputs[0]] += 1
    return frozenset(rows.values())


class _Overlay(dict):
    """Values on top of others that stay as they are."""

    def __init__(self, below: dict[int, Any]) -> None:
        super().__init__()
        self._below = below

    def __missing__(self, key: int) -> Any:
        return self._below[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._below


def _weight_only(program: Program) -> dict[int, Operation]:
    """Values that depend on weights and constants alone, and what computes them."""
    from_data, alone = set(program.inputs), {}
    for operation in program.operations:
        sources = [x for x in operation.inputs if not isinstance(x, Constant)]
        if any(x in from_data for x in sources):
            from_data.update(operation.outputs)
        else:
            alone |= dict.fromkeys(operation.outputs, operation)
    return alone


def _last_needed(program: Program, from_weights: Collection[int]) -> dict[int, list[int]]:
    """By position of an operation, the values that nothing needs after it. What is made of weights alone is computed
    only when data needs it, and its operands are needed until then."""
    last: dict[int, int] = {}
    for position, operation in reversed(list(enumerate(program.operations))):
        waits = operation.outputs[0] in from_weights
        due = max((last.get(x, position) for x in operation.outputs), default=position) if waits else position
        for x in operation.inputs:
            if not isinstance(x, Constant):
                last[x] = max(last.get(x, due), due)
    released = defaultdict(list)
    for x, position in last.items():
        released[position].append(x)
    return released


def _first_uses(recording: Recording, weight: str) -> Iterator[int]:
    """The values that a weight is combined with data into."""
    mine = {n for n, name in recording.weights.items() if name == weight}
    for step in recording.steps:
        if mine.intersection(step.sources):
            if step.number in recording.from_weights:
                mine.add(step.number)
            else:
                yield step.number
