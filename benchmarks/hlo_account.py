"""What a GPU's program does in one run, read from its HLO: kernels, matrix products, bytes, collectives, lower bounds.

Nothing is run: every time is a lower bound (benchmarks.hlo_cost).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from benchmarks.hlo import Module, parse, source
from benchmarks.hlo_cost import COLLECTIVES, FREE, Collective, Launch, Part, exchange_cost, kernel_cost
from gpt2_core.errors import UserError
from gpt2_jax.planning.gpus import Gpu


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
    """Lower bound."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop; `trips` is None if the program doesn't state how often it runs (it is then counted once)."""

    name: str
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Account:
    """One run of a program on one device; loops are counted as often as they run."""

    devices: int
    floor_ms: float
    """Lower bound without collectives: the sum of `parts_ms`."""
    parts_ms: dict[Part, float]
    exposed_ms: float
    """Waiting for collectives, in addition to the floor."""
    exchange_ms: float
    """Lower bound of all collectives, overlapped or not."""
    kernels: int
    products: list[Product]
    bytes_by_kind: dict[str, Traffic]
    groups: list[Group]
    collectives: list[Collective]
    loops: list[Loop]


def account(text: str, gpu: Gpu) -> Account:
    """Analyse the text of an optimized, scheduled HLO module; raises UserError if it isn't one."""
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
    """How far a device is in a computation, if everything takes its lower bound."""

    seconds: float = 0.0
    kernels: int = 0
    flops: float = 0.0

    def advance(self, seconds: float, kernels: int, flops: float) -> None:
        self.seconds, self.kernels, self.flops = self.seconds + seconds, self.kernels + kernels, self.flops + flops


class _Pending(NamedTuple):
    """A collective that has started: when it ends, and what was launched before it."""

    collective: Collective
    end: float
    kernels: int
    flops: float


def _walk(module: Module, name: str, gpu: Gpu, found: _Found, *, times: int, loops: tuple[str, ...]) -> _Progress:
    """Go through a computation in scheduled order, adding to `found` what each of its `times` runs does."""
    computation = module.computations[name]
    done = _Progress()
    link_free = 0.0  # collectives share the interconnect: one begins when the one before it has ended
    pending: dict[str, _Pending] = {}
    for i in computation.values():
        kind = i.operation.removesuffix("-start")
        if i.operation == "while":
            trips = i.find(r'known_trip_count":\{"n":"(\d+)"')
            loop = Loop(source(i, module), int(trips) if trips else None)
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
                f"the program has a conditional ({i.name}), and the text doesn't state how often each branch runs"
            )
        elif kind in COLLECTIVES:
            collective = exchange_cost(i, computation, module, gpu, times, loops)
            end = link_free = max(done.seconds, link_free) + collective.ms / 1e3
            under_way = _Pending(collective, end, done.kernels, done.flops)
            if i.operation == kind:
                found.collectives.append(_wait(under_way, done))
            else:
                pending[i.name] = under_way
        elif i.operation.endswith("-done"):
            if (under_way := pending.pop(i.operands[0], None)) is not None:
                found.collectives.append(_wait(under_way, done))
        elif i.operation not in FREE and not i.operation.endswith("-update"):
            launch = kernel_cost(i, computation, module, gpu, times)
            found.launches.append(launch)
            done.advance(launch.seconds, 1, launch.flops)
    return done


def _wait(pending: _Pending, done: _Progress) -> Collective:
    """The collective with what ran meanwhile; the device continues when it has ended."""
    exposed = max(0.0, pending.end - done.seconds)
    done.seconds += exposed
    return dataclasses.replace(
        pending.collective,
        exposed_ms=1e3 * exposed,
        kernels_beside=done.kernels - pending.kernels,
        flops_beside=done.flops - pending.flops,
    )


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
