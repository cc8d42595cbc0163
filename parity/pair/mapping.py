"""The mapping of one model's weights to the other's: a table that can be printed, edited, read back and applied."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as Map
from typing import Any

import numpy as np
import yaml

from parity.engine.errors import EngineError
from parity.models.model import Arrays, Weight
from parity.pair.naming import alike
from parity.pair.transforms import Transform, parse


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight of the target, and what it is made of."""

    source: tuple[str, ...]
    transform: Transform
    target: str
    verified: bool = True
    """Whether values that the models compute agree with it, or only names and shapes."""
    alternatives: tuple[str, ...] = ()
    """Other sources that fit as well."""
    use: str = ""
    """The operation that first uses it: a table that is looked up in is turned otherwise than a product's factor."""


@dataclasses.dataclass(frozen=True)
class Mapping:
    rows: list[Row]
    source_left: list[str]
    """Weights of the source that nothing is made of."""
    target_left: list[str]
    shapes: dict[str, tuple[int, ...]]
    """Of the source's weights."""
    confirmed: bool = False
    """Whether a person wrote it: then no transform is suspicious."""

    def apply(self, weights: Arrays) -> Arrays:
        """The target's weights from the source's; raises EngineError if a tensor is missing or doesn't fit."""
        made = {}
        for row in self.rows:
            if missing := [n for n in row.source if n not in weights]:
                raise EngineError(f"the mapping of {row.target} needs {', '.join(missing)}, which is not there")
            made[row.target] = row.transform(*(weights[n] for n in row.source))
        return made

    def unusual(self) -> list[tuple[Row, str]]:
        """Rows whose tensor is turned differently from its siblings' (the weights with the same last word) although
        the siblings' way would fit its shape too, and that way."""
        if self.confirmed:
            return []
        by_kind = defaultdict(list)
        for row in self.rows:
            by_kind[self._kind(row)].append(row)
        found = []
        for rows in by_kind.values():
            turned = Counter(row.transform.turn for row in rows)
            usual, count = turned.most_common(1)[0]
            for row in rows:
                if (
                    row.transform.turn != usual
                    and count > len(rows) / 2
                    and _may_turn(self.shapes[row.source[0]], usual)
                ):
                    found.append((row, usual))
        return found

    def _kind(self, row: Row) -> tuple:
        return row.target.rpartition(".")[2], len(self.shapes[row.source[0]]), row.use

    def as_yaml(self) -> str:
        table = [
            {
                "source": list(row.source) if len(row.source) > 1 else row.source[0],
                "transform": str(row.transform),
                "target": row.target,
            }
            for row in self.rows
        ]
        return yaml.safe_dump(table, sort_keys=False, allow_unicode=True)


def from_table(given: Any, source: Map[str, Weight], target: Map[str, Weight], ignore: Sequence[str]) -> Mapping:
    """A mapping that a person gives: YAML's text, a path to it, its list, or {target: source} for plain copies.
    Raises EngineError where it names what neither side has, or leaves something out that isn't in `ignore`."""
    table = _read(given)
    rows = []
    for entry in table:
        if not isinstance(entry, Map) or not {"source", "target"} <= entry.keys():
            raise EngineError(f"mapping: {entry!r} is not a row; expected source, transform and target")
        names = entry["source"] if isinstance(entry["source"], list | tuple) else [entry["source"]]
        for name in names:
            if name not in source:
                raise EngineError(f"mapping: {name} is no weight of the source; {_closest(name, source)}")
        if entry["target"] not in target:
            raise EngineError(
                f"mapping: {entry['target']} is no weight of the target; {_closest(entry['target'], target)}"
            )
        row = Row(tuple(names), parse(str(entry.get("transform", "identity"))), entry["target"])
        made = row.transform(*(source[n].value for n in names))
        wanted = target[row.target].shape
        if made.shape != wanted:
            raise EngineError(
                f"mapping: {row.target} has shape {wanted}, and {row.transform} of {names} gives {made.shape}"
            )
        rows.append(row)
    return complete(rows, source, target, ignore, confirmed=True)


def complete(
    rows: list[Row], source: Map[str, Weight], target: Map[str, Weight], ignore: Sequence[str], confirmed: bool = False
) -> Mapping:
    used = {name for row in rows for name in row.source}
    made = {row.target for row in rows}
    return Mapping(
        rows,
        [n for n, w in source.items() if n not in used and n not in ignore and w.kept],
        [n for n, w in target.items() if n not in made and n not in ignore and w.kept],
        {n: w.shape for n, w in source.items()},
        confirmed,
    )


def with_unused(rows: list[Row], source: Map[str, Weight], target: Map[str, Weight]) -> list[Row]:
    """Rows for weights that no output depends on, in both models: of equal shape and all but equal name."""
    used, made, found = {n for r in rows for n in r.source}, {r.target for r in rows}, []
    for name, weight in target.items():
        fitting = [n for n, w in source.items() if n not in used and w.shape == weight.shape]
        best = max(fitting, key=lambda n: alike(name, n), default=None) if name not in made else None
        if best is not None and best.rpartition(".")[2] == name.rpartition(".")[2] and alike(name, best) > UNUSED_ALIKE:
            used.add(best)
            found.append(Row((best,), Transform(), name, verified=False))
    return [*rows, *found]


UNUSED_ALIKE = 1.7
"""Of two names (see `alike`) that are taken for one without a value to show it."""


def with_buffers(rows: list[Row], source: Map[str, Weight], target: Map[str, Weight]) -> list[Row]:
    """Rows for buffers that no output shows (statistics in training mode): those of a module whose other tensors are
    mapped, by their names."""
    modules: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        modules[row.target.rpartition(".")[0]][row.source[0].rpartition(".")[0]] += 1
    used, made, found = {n for r in rows for n in r.source}, {r.target for r in rows}, []
    for name, weight in target.items():
        if name in made or weight.trained:
            continue
        module, _, leaf = name.rpartition(".")
        # Linen and Haiku keep statistics apart from parameters: batch_stats.bn.mean beside bn.scale.
        known = modules.get(module) or modules.get(module.partition(".")[2]) or Counter()
        for there, _ in known.most_common(1):
            fitting = [
                n
                for n, w in source.items()
                if n.rpartition(".")[0] == there and n not in used and not w.trained and w.shape == weight.shape
            ]
            best = max(fitting, key=lambda n: alike(leaf, n.rpartition(".")[2]), default=None)
            if best is not None:
                used.add(best)
                found.append(Row((best,), Transform(), name, verified=False))
    return [*rows, *found]


def _read(given: Any) -> list:
    if isinstance(given, Mapping):
        return yaml.safe_load(given.as_yaml())
    if isinstance(given, Map):
        return [{"source": s, "target": t} for t, s in given.items()]
    if isinstance(given, str):
        text = given
        if "\n" not in given:
            try:
                with open(given, encoding="utf-8") as file:
                    text = file.read()
            except OSError as error:
                raise EngineError(f"mapping {given}: can't be read ({error.strerror})") from error
        try:
            given = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise EngineError(f"mapping: is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(given, list):
        raise EngineError(
            f"mapping: expected a list of rows with source, transform and target, not {type(given).__name__}"
        )
    return given


def _closest(name: str, among: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(among), 1)
    return f"did you mean {close[0]}?" if close else "print report.mapping to see the names"


def _may_turn(shape: tuple[int, ...], turn: str) -> bool:
    """Whether a tensor keeps its shape when it is turned, so that a wrong turn goes unnoticed."""
    if turn in ("", "transpose"):
        return len(shape) == 2 and shape[0] == shape[1]
    return True


def converter(mapping: Mapping) -> Callable[[Arrays], Arrays]:
    """A plain function from the source's checkpoint (arrays by name) to the target's, in the arrays' own dtype."""

    def convert(weights: Arrays) -> Arrays:
        return mapping.apply({name: np.asarray(x) for name, x in weights.items()})

    return convert
