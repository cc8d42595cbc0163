"""Parsing the text of an optimized HLO module, as XLA prints it."""

import dataclasses
import math
import re
from typing import NamedTuple

from gpt2_core.errors import UserError

ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2} | {f"{kind}{8 * n}": n for kind in "suf" for n in (1, 2, 4, 8)}


class Array(NamedTuple):
    """An array's dtype by HLO's names (bf16, f32) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return ITEM_BYTES.get(self.dtype, 0) * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """A line of a computation: `name = results operation(operands), attributes`."""

    name: str
    results: tuple[Array, ...]
    """The result's arrays; a tuple's are flattened."""
    operation: str
    operands: tuple[str, ...]
    argument: str
    """The text within the parentheses."""
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.results)

    def find(self, pattern: str) -> str | None:
        """The first group of a regular expression that is searched for in the attributes."""
        found = re.search(pattern, self.attributes)
        return found and found[1]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed HLO module."""

    computations: dict[str, Computation]
    """By name; each has its instructions by name, in the order in which they are scheduled."""
    entry: str
    devices: int
    """Number of partitions."""
    stacks: dict[int, tuple[str, ...]]
    """The Python functions, outermost first, that a `stack_frame_id` stands for."""


def parse(text: str) -> Module:
    """The computations of an HLO module's text; raises UserError if it isn't one."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.$-]+) \(.*\{$", line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := re.match(r"\s+(ROOT )?%([\w.$-]+) = (.*)", line):
            current[found[2]] = _instruction(found[2], found[3], is_root=bool(found[1]))
    if entry is None:
        raise UserError("not the text of an HLO module: it has no ENTRY computation")
    devices = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
    return Module(computations, entry, int(devices[1]) if devices else 1, _stacks(text))


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    results, rest = _split_balanced(text) if text.startswith("(") else text.split(" ", 1)
    operation, bracket, _ = rest.strip().partition("(")
    argument, attributes = _split_balanced(rest.strip()[len(operation) :])
    operands = tuple(re.findall(r"%([\w.$-]+)", argument))
    return Instruction(name, arrays(results), operation, operands, argument[1:-1], attributes, is_root)


def _split_balanced(text: str) -> tuple[str, str]:
    """The bracketed expression that the text begins with, and the rest."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return text[: bracket.end()], text[bracket.end() :]
    raise UserError(f"not the text of an HLO module: a bracket is never closed in {text[:80]!r}")


def arrays(type_: str) -> tuple[Array, ...]:
    """The arrays in an HLO type."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_)
    return tuple(Array(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found)


def _stacks(text: str) -> dict[int, tuple[str, ...]]:
    """The tables at the beginning of a module that give the Python call stack of each `stack_frame_id`."""

    def table(title: str) -> dict[int, str]:
        section = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.M)
        return {int(n): row for n, row in re.findall(r"^(\d+) (.*)$", section[1], re.M)} if section else {}

    def number(row: str, key: str) -> int:
        return int(re.search(rf"\b{key}=(\d+)", row)[1])

    functions = {n: row.strip('"') for n, row in table("FunctionNames").items()}
    locations = {n: functions[number(row, "function_name_id")] for n, row in table("FileLocations").items()}
    stacks: dict[int, tuple[str, ...]] = {0: ()}
    # A frame comes after its parent, whose number is stored plus one: 1 means none.
    for frame, row in table("StackFrames").items():
        parent = stacks[number(row, "parent_frame_id") - 1]
        stacks[frame] = (*parent, locations[number(row, "file_location_id")])
    return stacks


def source(i: Instruction, module: Module) -> str:
    """The model's operation that an instruction comes from: direction, functions and named scopes, primitive.

    It is the same for all layers. For an instruction that the compiler added it is the name without its number.
    """
    op_name = (i.find(r'\bop_name="([^"]*)"') or "").partition(";")[0]
    frame = i.find(r"\bstack_frame_id=(\d+)")
    if not op_name:
        return "made by the compiler: " + re.sub(r"(-start)?[.0-9]*$", "", i.name)
    functions = [_plain_function(name) for name in module.stacks.get(int(frame or 0), ())]
    path = [part for part in _unwrapped(op_name).split("/")[1:] if part and part not in _WRAPPERS]
    words = list(dict.fromkeys([*functions[-2:], *path]))
    return re.sub(r"\bh\.\d+", "h.*", f"{_direction(op_name)}: {' / '.join(words)}")


_WRAPPERS = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation"}


def _direction(op_name: str) -> str:
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "step"


def _unwrapped(op_name: str) -> str:
    """The path without JAX's transformations: `jit(step)/transpose(jvp(h.0))/mul` is `step/h.0/mul`."""
    inner = re.sub(r"\b\w+\(([^()]*)\)", r"\1", op_name)
    return op_name if inner == op_name else _unwrapped(inner)


def _plain_function(name: str) -> str:
    return re.sub(r"\.(<locals>|<lambda>|<genexpr>|__call__)", "", name)
