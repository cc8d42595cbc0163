"""What a program for a GPU does, read from its HLO: kernels, products, bytes, collectives, and the least time.

Bytes are those of whole operands and results (of slices and in-place updates only the part they touch), as if no cache
held them. Nothing is run: every time is a lower bound from the rates of a `Gpu`.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Literal, NamedTuple

from benchmarks.gpu import Gpu
from benchmarks.hlo import ITEM_BYTES, Computation, Instruction, Module, parse
from gpt2_core.errors import UserError

# Instructions that launch nothing and move nothing.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
_COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
_MOVES = {"copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "broadcast"}
COPY = "copy, transpose or broadcast"
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice", "scatter"}

Part = Literal["products", "attention", "rest"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, and how often a run of the program launches it; bytes, FLOPs and seconds are those of one launch."""

    kind: str
    part: Part
    source: str
    """The model's operation it comes from, the same for all layers."""
    shape: str
    times: int
    bytes: int
    flops: float
    seconds: float
    """Least time, from the GPU's rates."""
    product: str = ""
    """Of a matrix product: left and right operand, result, and what is fused into it."""
    float32: bool = False
    """Whether a product has a float32 operand."""


@dataclasses.dataclass(frozen=True)
class Product:
    """Matrix products of the same shapes, all launches together."""

    shapes: str
    launches: int
    flops: float
    ms: float
    share: float
    """Of the floor."""
    float32: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Kernels of one kind that come from the same operation of the model, all launches together."""

    source: str
    kind: str
    shape: str
    launches: int
    bytes: int
    ms: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Kernels of one kind, all launches together."""

    launches: int
    bytes: int
    ms: float
    """Least time."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices; bytes and times are those of one occurrence on one device."""

    kind: str
    bytes: int
    """Of the whole arrays: what is summed, what a gather results in, what a scatter starts from."""
    bytes_by_dtype: dict[str, int]
    devices: int
    """That take part in it together."""
    times: int
    loops: tuple[str, ...]
    """The loops around it, outermost first."""
    source: str
    ms: float
    """Least time on the interconnect."""
    exposed_ms: float
    """The part of it that the device waits for, if all kernels take their least time."""
    kernels_beside: int
    """Launched between its start and its end."""
    flops_beside: float


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop; `trips` is None where the program doesn't say how often it runs (it is then counted once)."""

    name: str
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Account:
    """One run of a program on one device; loops are counted as often as they run."""

    devices: int
    floor_ms: float
    """Least time without exchanges: the sum of `parts_ms`."""
    parts_ms: dict[Part, float]
    exposed_ms: float
    """Waiting for exchanges, beyond the floor."""
    exchange_ms: float
    """Least time of all exchanges, overlapped or not."""
    kernels: int
    products: list[Product]
    bytes_by_kind: dict[str, Traffic]
    groups: list[Group]
    collectives: list[Collective]
    loops: list[Loop]


def account(text: str, gpu: Gpu) -> Account:
    """Account for the text of an optimized, scheduled HLO module; raises UserError if it isn't one."""
    module = parse(text)
    found = _Found([], [], [])
    _walk(module, module.entry, gpu, found, times=1, loops=())
    floor = {part: 0.0 for part in ("products", "attention", "rest")}
    for launch in found.launches:
        floor[launch.part] += 1e3 * launch.times * launch.seconds
    floor_ms = sum(floor.values())
    return Account(
        devices=module.devices,
        floor_ms=floor_ms,
        parts_ms=floor,
        exposed_ms=sum(c.times * c.exposed_ms for c in found.collectives),
        exchange_ms=sum(c.times * c.ms for c in found.collectives),
        kernels=sum(launch.times for launch in found.launches),
        products=_products(found.launches, floor_ms),
        bytes_by_kind=_bytes_by_kind(found.launches),
        groups=_groups(found.launches),
        collectives=found.collectives,
        loops=found.loops,
    )


@dataclasses.dataclass
class _Found:
    launches: list[Launch]
    collectives: list[Collective]
    loops: list[Loop]


@dataclasses.dataclass
class _Progress:
    """How far a device is in a computation, if everything takes its least time."""

    seconds: float = 0.0
    kernels: int = 0
    flops: float = 0.0

    def advance(self, seconds: float, kernels: int, flops: float) -> None:
        self.seconds, self.kernels, self.flops = self.seconds + seconds, self.kernels + kernels, self.flops + flops


class _Pending(NamedTuple):
    """A collective under way: when it ends, and what had been launched before it."""

    collective: Collective
    end: float
    kernels: int
    flops: float


def _walk(module: Module, name: str, gpu: Gpu, found: _Found, *, times: int, loops: tuple[str, ...]) -> _Progress:
    """Go through a computation in the order of its schedule, adding to `found` what each of `times` runs does."""
    computation = module.computations[name]
    done = _Progress()
    link_free = 0.0  # exchanges share the interconnect: one begins when the one before it has ended
    pending: dict[str, _Pending] = {}
    for i in computation.values():
        kind = i.operation.removesuffix("-start")
        if i.operation == "while":
            trips = i.find(r'known_trip_count":\{"n":"(\d+)"')
            loop = Loop(_source(i, module), int(trips) if trips else None)
            found.loops.append(loop)
            count = loop.trips or 1
            inside = (*loops, f"{loop.name} x {loop.trips or 'unknown'}")
            body = _walk(module, i.find(r"\bbody=%([\w.$-]+)"), gpu, found, times=times * count, loops=inside)
            done.advance(count * body.seconds, count * body.kernels, count * body.flops)
        elif i.operation in ("call", "async-start"):
            called = i.find(r"\b(?:to_apply|calls)=%([\w.$-]+)")
            inner = _walk(module, called, gpu, found, times=times, loops=loops)
            done.advance(inner.seconds, inner.kernels, inner.flops)
        elif i.operation == "conditional":
            raise UserError(
                f"the program has a conditional ({i.name}): how often each branch runs can't be read off it"
            )
        elif kind in _COLLECTIVES:
            collective = _collective(i, computation, module, gpu, times, loops)
            end = link_free = max(done.seconds, link_free) + collective.ms / 1e3
            under_way = _Pending(collective, end, done.kernels, done.flops)
            if i.operation == kind:
                found.collectives.append(_wait(under_way, done))
            else:
                pending[i.name] = under_way
        elif i.operation.endswith("-done"):
            if (under_way := pending.pop(i.operands[0], None)) is not None:
                found.collectives.append(_wait(under_way, done))
        elif i.operation not in _FREE and not i.operation.endswith("-update"):
            launch = _launch(i, computation, module, gpu, times)
            found.launches.append(launch)
            done.advance(launch.seconds, 1, launch.flops)
    return done


def _wait(pending: _Pending, done: _Progress) -> Collective:
    """The collective with what ran beside it; the device goes on when it has ended."""
    exposed = max(0.0, pending.end - done.seconds)
    done.seconds += exposed
    return dataclasses.replace(
        pending.collective,
        exposed_ms=1e3 * exposed,
        kernels_beside=done.kernels - pending.kernels,
        flops_beside=done.flops - pending.flops,
    )


def _collective(
    i: Instruction, computation: Computation, module: Module, gpu: Gpu, times: int, loops: tuple[str, ...]
) -> Collective:
    kind = i.operation.removesuffix("-start")
    devices = _group_size(i, module.devices)
    whole = devices if kind == "all-gather" else 1
    by_dtype: dict[str, int] = defaultdict(int)
    for operand in i.operands:
        for array in computation[operand].results:
            by_dtype[array.dtype] += whole * array.bytes
    total = sum(by_dtype.values())
    return Collective(
        kind=kind,
        bytes=total,
        bytes_by_dtype=dict(by_dtype),
        devices=devices,
        times=times,
        loops=loops,
        source=_source(i, module),
        ms=1e3 * total * _share_sent(kind, devices) / gpu.link_bandwidth,
        exposed_ms=0.0,
        kernels_beside=0,
        flops_beside=0.0,
    )


def _share_sent(kind: str, devices: int) -> float:
    """Which multiple of the whole arrays a device sends on a ring (Patarasuk & Yuan 2009)."""
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def _group_size(i: Instruction, devices: int) -> int:
    """Devices that exchange with each other, from any of the forms in which HLO writes its groups."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", i.attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # An axis is named whole, or as a part of it: 'axis':(what comes before)size.
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if iota := i.find(r"replica_groups=\[\d+,(\d+)\]"):
        return int(iota)
    if listed := i.find(r"replica_groups=\{\{([\d,]+)\}"):
        return len(listed.split(","))
    return devices


def _launch(i: Instruction, computation: Computation, module: Module, gpu: Gpu, times: int) -> Launch:
    """A kernel, its traffic, its arithmetic and its least time."""
    kind, part, flops, product, float32 = i.operation, "rest", 0.0, "", False
    moved = i.bytes + sum(computation[name].bytes for name in set(i.operands))
    rate = math.inf
    if i.operation == "custom-call":
        kind = i.find(r'custom_call_target="([^"]*)"')
        if kind.startswith("__cublas"):
            part = "products"
            moved -= sum(array.bytes for array in i.results if array.dtype == "s8")  # the workspace
            product, flops, rate, float32 = _product(i, computation, gpu)
        elif kind.startswith("__cudnn$fmha"):
            part, flops, rate = "attention", _attention_flops(i, computation), gpu.attention_flops
    elif i.operation == "fusion":
        body = module.computations[i.find(r"\bcalls=%([\w.$-]+)")]
        kind, moved = _fusion_kind(i, body), _fusion_bytes(i, body)
        for inner in body.values():
            if inner.operation == "dot":
                part = "products"
                product, flops, rate, float32 = _product(inner, body, gpu)
    elif i.operation == "dot":
        part = "products"
        product, flops, rate, float32 = _product(i, computation, gpu)
    elif i.operation == "dynamic-slice":
        kind, moved = COPY, 2 * i.bytes
    elif i.operation == "dynamic-update-slice":
        kind, moved = COPY, 2 * computation[i.operands[1]].bytes
    elif i.operation in _MOVES:
        kind = COPY
    seconds = max(flops / rate, moved / gpu.bandwidth)
    shown = [str(array) for array in i.results if array.dtype not in ("s8", "u8")]  # without workspaces
    shape = " ".join(shown[:3]) + (" ..." if len(shown) > 3 else "")
    return Launch(kind, part, _source(i, module), shape, times, moved, flops, seconds, product, float32)


def _fusion_kind(i: Instruction, body: Computation) -> str:
    operations = {inner.operation for inner in body.values()} - _FREE
    if operations <= _MOVES:
        return COPY
    if operations <= {*_MOVES, "convert"}:
        return "conversion of dtype"
    emitter = i.find(r'"kind":"__(\w+)"') or i.find(r"\bkind=k(\w+)")
    return f"fusion, {emitter.lower()}"


def _fusion_bytes(i: Instruction, body: Computation) -> int:
    """What a fusion reads and writes: of an array that is only sliced or updated in place, the part it touches."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    for inner in body.values():
        for operand in inner.operands:
            users[operand].append(inner)

    def uses(name: str) -> Iterator[tuple[str, Instruction]]:
        """Who uses an array, through bitcasts, and by what name."""
        for user in users[name]:
            yield from uses(user.name) if user.operation == "bitcast" else [(name, user)]

    def written(inner: Instruction) -> int:
        if inner.operation == "bitcast":
            return written(body[inner.operands[0]])
        if inner.operation == "tuple":
            return sum(written(body[name]) for name in inner.operands)
        if inner.operation == "dynamic-update-slice":
            return body[inner.operands[1]].bytes
        if inner.operation == "scatter":
            return 2 * body[inner.operands[2]].bytes  # it adds to what is there
        return inner.bytes

    parameters = {int(inner.argument): inner for inner in body.values() if inner.operation == "parameter"}
    total, whole = written(next(inner for inner in body.values() if inner.is_root)), set()
    for number, operand in enumerate(i.operands):
        found = list(uses(parameters[number].name))
        firsts = {user.operation for name, user in found if user.operands[0] == name}
        by_part = bool(found) and all(user.operands[0] == name for name, user in found)
        if by_part and firsts <= _SLICES:
            total += sum(user.bytes for _, user in found)
        elif not (by_part and firsts <= _UPDATES) and operand not in whole:
            whole.add(operand)
            total += parameters[number].bytes
    return total


def _product(i: Instruction, computation: Computation, gpu: Gpu) -> tuple[str, float, float, bool]:
    """A matrix product in words, its FLOPs, the rate it can reach, and whether an operand is float32 (or wider)."""
    left, right = (computation[name].results[0] for name in i.operands[:2])
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)', i.attributes)[1]
    flops = 2 * math.prod(i.results[0].shape) * math.prod(left.shape[int(n)] for n in re.findall(r"\d+", contracted))
    words = f"{left} x {right} -> {i.results[0]}"
    epilogue, beta = i.find(r'"epilogue":"(\w+)"'), i.find(r'"beta":([\d.]+)')
    words += f" {epilogue}" if epilogue not in (None, "DEFAULT") else ""
    words += " +=" if beta and float(beta) else ""
    float32 = max(ITEM_BYTES[left.dtype], ITEM_BYTES[right.dtype]) > 2
    if not float32:
        return words, flops, gpu.product_flops, float32
    exact = re.search(r'operand_precision"?[=:][\[{][^\]}]*highest', i.attributes, re.I)
    return words, flops, gpu.float32_flops if exact else gpu.tf32_flops, float32


def _attention_flops(i: Instruction, computation: Computation) -> float:
    """Of cuDNN's flash attention: two products of (T, S, K) forward and five backward; half of each if it is causal."""
    square = i.find(r'"intermediate_tensor_shape":\s*\{[^[]*"dimensions":\s*\[([^\]]*)\]')
    head_size = computation[i.operands[0]].results[0].shape[-1]
    products = 5 if "Backward" in i.attributes else 2
    causal = re.search(r'"mask_type":\s*"CAUSAL"', i.attributes)
    scores = math.prod(int(n) for n in re.findall(r"\d+", square))
    return 2 * products * scores * head_size / (2 if causal else 1)


def _source(i: Instruction, module: Module) -> str:
    """The model's operation that an instruction comes from: direction, functions and named scopes, primitive.

    All layers have the same; an instruction that the compiler made has its own name without its number.
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


def _by_key(launches: Iterable[Launch], key: Callable[[Launch], Hashable]) -> dict[Hashable, list[Launch]]:
    groups: dict[Hashable, list[Launch]] = defaultdict(list)
    for launch in launches:
        groups[key(launch)].append(launch)
    return groups


def _total(launches: list[Launch], field: str) -> float:
    return sum(launch.times * getattr(launch, field) for launch in launches)


def _products(launches: list[Launch], floor_ms: float) -> list[Product]:
    groups = _by_key((launch for launch in launches if launch.product), lambda launch: launch.product)
    products = []
    for shapes, alike in groups.items():
        ms = 1e3 * _total(alike, "seconds")
        count = sum(launch.times for launch in alike)
        products.append(Product(shapes, count, _total(alike, "flops"), ms, ms / floor_ms, alike[0].float32))
    return sorted(products, key=lambda product: -product.ms)


def _bytes_by_kind(launches: list[Launch]) -> dict[str, Traffic]:
    groups = _by_key(launches, lambda launch: launch.kind)
    kinds = {
        kind: Traffic(sum(launch.times for launch in alike), _total(alike, "bytes"), 1e3 * _total(alike, "seconds"))
        for kind, alike in groups.items()
    }
    return dict(sorted(kinds.items(), key=lambda item: -item[1].bytes))


def _groups(launches: list[Launch]) -> list[Group]:
    groups = _by_key(launches, lambda launch: (launch.source, launch.kind, launch.shape))
    found = [
        Group(*key, sum(launch.times for launch in alike), _total(alike, "bytes"), 1e3 * _total(alike, "seconds"))
        for key, alike in groups.items()
    ]
    return sorted(found, key=lambda group: -group.ms)
