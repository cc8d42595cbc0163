"""The kind of each GPU kernel, by its name, and the time that a step spends on each kind.

The name of a kernel that JAX compiled says little (`loop_add_fusion_3`); the model's operation that it comes from,
found in the program's text, says more.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# In the order of a table. "products" are matrix products and name their dtype: "products, bfloat16".
PRODUCTS, ATTENTION, LOSS, NORM, OPTIMIZER = "products", "attention", "loss", "norms", "optimizer and clipping"
EMBEDDING, COPY, EXCHANGE, REST = "embeddings", "copies and conversions", "exchange", "elementwise and reductions"

# The first pattern that matches a name, ignoring case, gives its kind.
_BY_NAME = (
    (EXCHANGE, r"nccl"),
    (ATTENTION, r"flash|sdpa|fmha|attention|dot_do_o|convert_dq"),
    (PRODUCTS, r"gemm|gemv|nvjet|cutlass|cublas|splitk|_tem_fused|matmul|triton_mm|\bdot_"),
    (OPTIMIZER, r"adam|multi_tensor_apply|lpnorm|foreach|clip_grad"),
    (LOSS, r"softmax|nll_loss|cross_entropy|logsumexp"),
    (NORM, r"layer_?norm|gammabeta|rms_?norm|add_norm"),
    (EMBEDDING, r"embedding|scatter|gather|index_put|indexing_backward"),
    (COPY, r"memcpy|memset|transpose|concatenate|catarray|slice|direct_copy|\bcopy|pad_fusion|"
           r"(wrapped|loop)_(convert|copy|broadcast)(_fusion)?\b|fused(_+(to_copy|clone|view|t|cat))+$"),
)  # fmt: skip

# The same for the operations of gpt2_jax's programs (benchmarks.hlo.source).
_BY_SOURCE = (
    (ATTENTION, r"attention"),
    (OPTIMIZER, r"^step: .*(tree_|adam|clip|train_step\.step / (sub|add|mul)|update)"),
    (LOSS, r"_chunk|summed_cross_entropy|GPT2\.loss|part_loss|_in_(one_pass|two_passes)"),
    (NORM, r"add_norm|layer_norm|Norm\b"),
    (EMBEDDING, r"_embed|Embedding"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: its name, when it began and how long it took in nanoseconds, and the model's operation if known."""

    name: str
    start: float
    duration: float
    source: str = ""


def classify(name: str, source: str = "") -> str:
    """The kind of a kernel, by its name and by the operation of the model that it comes from ("" where unknown)."""
    lower = name.lower()
    kind = next((kind for kind, pattern in _BY_NAME if re.search(pattern, re.sub(r"_\d+$", "", lower))), REST)
    if kind == PRODUCTS:
        return f"{PRODUCTS}, {_product_dtype(lower)}"
    of_source = next((kind for kind, pattern in _BY_SOURCE if re.search(pattern, source)), REST)
    # A fusion is named after its last operation or its shape: one of the optimizer's may be named a concatenation, one
    # of a layer norm's a softmax.
    named_by_chance = kind in (LOSS, NORM) or (kind == COPY and of_source in (OPTIMIZER, LOSS))
    return of_source if kind == REST or (named_by_chance and of_source != REST) else kind


def _product_dtype(name: str) -> str:
    """The dtype of a product's operands, as cuBLAS, CUTLASS and others write it into a kernel's name."""
    if jet := re.search(r"nvjet_(?:sm\d+_)?([a-z])", name):  # the first letter is the first operand's
        return {"t": "bfloat16", "h": "float16", "s": "tf32", "q": "float8", "d": "float64"}.get(jet[1], "unknown")
    for dtype, pattern in (
        ("tf32", r"tf32|s1688gemm"),
        ("bfloat16", r"bf16|bfloat16"),
        ("float64", r"dgemm|f64|double"),
        ("float32", r"sgemm|f32f32|simt|float"),
        ("float16", r"hgemm|f16|half"),
    ):
        if re.search(pattern, name):
            return dtype
    return "dtype not named"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where a step's time goes, in milliseconds a step."""

    step_ms: float
    """Measured without a profiler."""
    busy_ms: float
    """Time in which at least one kernel runs."""
    gaps_ms: float
    """The rest of the step."""
    launches: float
    kinds: dict[str, dict[str, float]]
    """`ms` and `launches` by kind, the longest first."""
    kernels: list[dict[str, Any]]
    """`name`, `kind`, `source`, `ms` and `launches` of the kernels that take longest."""


def profile(kernels: Sequence[Kernel], *, steps: int, step_seconds: float, top: int = 40) -> Profile:
    """Sum up the kernels of so many steps; a step takes `step_seconds` without a profiler."""
    kinds: dict[str, list[float]] = defaultdict(list)
    names: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        kind = classify(kernel.name, kernel.source)
        kinds[kind].append(kernel.duration)
        names[re.sub(r"_\d+$", "", kernel.name)[:160], kind, kernel.source].append(kernel.duration)

    def total(durations: list[float]) -> dict[str, float]:
        return {"ms": sum(durations) / steps / 1e6, "launches": len(durations) / steps}

    rows = [{"name": name, "kind": kind, "source": source} | total(found)
            for (name, kind, source), found in names.items()]  # fmt: skip
    busy = _covered(kernels) / steps / 1e6
    return Profile(
        step_ms=1e3 * step_seconds,
        busy_ms=busy,
        gaps_ms=1e3 * step_seconds - busy,
        launches=len(kernels) / steps,
        kinds=dict(sorted(((kind, total(found)) for kind, found in kinds.items()), key=lambda row: -row[1]["ms"])),
        kernels=sorted(rows, key=lambda row: -row["ms"])[:top],
    )


def _covered(kernels: Iterable[Kernel]) -> float:
    """Nanoseconds in which at least one of them runs."""
    covered, end = 0.0, -float("inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        stop = kernel.start + kernel.duration
        covered += max(0.0, stop - max(end, kernel.start))
        end = max(end, stop)
    return covered


def from_xspace(space: Any, sources: Mapping[str, str]) -> list[Kernel]:
    """The kernels in a trace of JAX's profiler (a jax.profiler.ProfileData); `sources` are those of `sources_of`.

    A GPU's plane has a line for each stream, and further lines that show the same kernels again. Raises LookupError if
    there is no GPU's plane.
    """
    planes = [plane for plane in space.planes if plane.name.startswith("/device:GPU")]
    if not planes:
        raise LookupError(f"the trace has no GPU in it, only {', '.join(plane.name for plane in space.planes)}")
    kernels = []
    for plane in planes:
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op", event.name)
                    source = sources.get(_plain(str(operation)), "")
                    kernels.append(Kernel(event.name, event.start_ns, event.duration_ns, source))
    return kernels


def from_chrome_trace(trace: Mapping[str, Any]) -> list[Kernel]:
    """The kernels in a trace that PyTorch's profiler exported, with times in microseconds."""
    on_device = {"kernel", "gpu_memcpy", "gpu_memset"}
    return [
        Kernel(event["name"], 1e3 * event["ts"], 1e3 * event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in on_device
    ]


def _plain(name: str) -> str:
    """An HLO instruction's name as in its kernel's name, which has only letters, digits and _."""
    return re.sub(r"\W", "_", name)


def sources_of(text: str) -> dict[str, str]:
    """The model's operation of each instruction of an HLO module's text, by the instruction's plain name."""
    from benchmarks.hlo import parse, source

    module = parse(text)
    return {
        _plain(i.name): source(i, module)
        for computation in module.computations.values()
        for i in computation.values()
        if i.operation in ("fusion", "custom-call") or i.operation.startswith(("copy", "dot", "all-", "reduce"))
    }
