"""The cost of single HLO instructions on a GPU: bytes, operations, a lower bound of a kernel's or collective's time.

Bytes are those of whole operands and results (of slices and in-place updates only the part they touch), as if nothing
were cached. Times are lower bounds from the rates of a `Gpu`.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

from benchmarks.hlo import ITEM_BYTES, Computation, Instruction, Module, source
from gpt2_jax.planning.gpus import Gpu

# Instructions that launch nothing and move nothing.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
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
    """Lower bound, from the GPU's rates."""
    product: str = ""
    """Of a matrix product: left and right operand, result, and what is fused into it."""
    float32: bool = False
    """Whether a product has a float32 operand."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of several devices; bytes and times are those of one occurrence on one device."""

    kind: str
    bytes: int
    """Of the whole arrays: of an all-reduce, of an all-gather's result, of a reduce-scatter's operand."""
    bytes_by_dtype: dict[str, int]
    devices: int
    """Devices that take part in it together."""
    times: int
    loops: tuple[str, ...]
    """The loops around it, outermost first."""
    source: str
    ms: float
    """Lower bound, on the interconnect."""
    exposed_ms: float
    """The part of it that the device waits for, if all kernels take their lower bounds."""
    kernels_beside: int
    """Launched between its start and its end."""
    flops_beside: float


def kernel_cost(i: Instruction, computation: Computation, module: Module, gpu: Gpu, times: int) -> Launch:
    """A kernel's memory traffic, arithmetic and lower bound."""
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
    return Launch(kind, part, source(i, module), shape, times, moved, flops, seconds, product, float32)


def _fusion_kind(i: Instruction, body: Computation) -> str:
    operations = {inner.operation for inner in body.values()} - FREE
    if operations <= _MOVES:
        return COPY
    if operations <= {*_MOVES, "convert"}:
        return "conversion of dtype"
    emitter = i.find(r'"kind":"__(\w+)"') or i.find(r"\bkind=k(\w+)")
    return f"fusion, {emitter.lower()}"


def _fusion_bytes(i: Instruction, body: Computation) -> int:
    """Bytes that a fusion reads and writes; of an array only sliced or updated in place, those it touches."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    for inner in body.values():
        for operand in inner.operands:
            users[operand].append(inner)

    def uses(name: str) -> Iterator[tuple[str, Instruction]]:
        """The users of an array, through bitcasts, each with the name by which it uses it."""
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


def exchange_cost(
    i: Instruction, computation: Computation, module: Module, gpu: Gpu, times: int, loops: tuple[str, ...]
) -> Collective:
    """A collective, before it is known what runs meanwhile."""
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
        source=source(i, module),
        ms=1e3 * total * _share_sent(kind, devices) / gpu.link_bandwidth,
        exposed_ms=0.0,
        kernels_beside=0,
        flops_beside=0.0,
    )


def _share_sent(kind: str, devices: int) -> float:
    """Bytes that a device sends in a ring, as a multiple of the whole arrays (Patarasuk & Yuan 2009)."""
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (devices - 1) / devices


def _group_size(i: Instruction, devices: int) -> int:
    """Number of devices in a replica group, from any of the forms in which HLO writes groups."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", i.attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # A whole axis by its name, or a part of one as 'axis':(size before)size.
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if iota := i.find(r"replica_groups=\[\d+,(\d+)\]"):
        return int(iota)
    if listed := i.find(r"replica_groups=\{\{([\d,]+)\}"):
        return len(listed.split(","))
    return devices
