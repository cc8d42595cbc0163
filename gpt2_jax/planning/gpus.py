"""GPUs that programs are compiled for: XLA's description of each, and the rates it can reach."""

import dataclasses
import re
from pathlib import Path

from gpt2_core.errors import UserError

_FOLDER = Path(__file__).parent / "targets"

# Attainable rates of bfloat16 matrix products in FLOP/s. H200: measured, a large square product (docs/performance.md);
# an H100 SXM has the same matrix units. A100: 0.9 of the datasheet's 312 TFLOP/s, not measured.
_PRODUCT_FLOPS = {"h200": 0.79e15, "h100": 0.79e15, "a100": 0.28e15}

# NVLink, bytes/s in one direction, from NVIDIA's datasheets (900 and 600 GB/s in both directions together).
_LINK_BANDWIDTH = {"h200": 450e9, "h100": 450e9, "a100": 300e9}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What bounds a program on one GPU. Rates in FLOP/s, bandwidths in bytes/s."""

    name: str
    """The driver's name for it."""
    capability: tuple[int, int]
    product_flops: float
    """bfloat16 products on the matrix units."""
    float32_flops: float
    """True float32 products, on the vector units."""
    bandwidth: float
    """Of device memory."""
    link_bandwidth: float
    """Of the interconnect, in one direction."""
    memory: int
    """Bytes of device memory."""

    @property
    def tf32_flops(self) -> float:
        """float32 products on the matrix units, rounded to TF32: half the rate of bfloat16 (NVIDIA's datasheets)."""
        return self.product_flops / 2

    @property
    def attention_flops(self) -> float:
        """Of cuDNN's flash attention, forward and backward together: 0.6 of a large product's rate, an estimate."""
        return 0.6 * self.product_flops


def target_of(device: str) -> str | None:
    """The target of a device, by the driver's name for it ("NVIDIA H200"); None if there is none."""
    return next((name for name in _PRODUCT_FLOPS if name.upper() in device), None)


def description(name: str) -> str:
    """The GpuTargetConfigProto of a target, as text; raises UserError for a name that isn't known."""
    if name not in _PRODUCT_FLOPS:
        raise UserError(f"--target {name}: no such GPU; use {', '.join(_PRODUCT_FLOPS)}")
    return (_FOLDER / f"{name}.txtpb").read_text(encoding="utf-8")


def load(name: str) -> Gpu:
    """A target by the name that `--target` takes; raises UserError for one that isn't known."""
    text = description(name)

    def number(field: str) -> float:
        return float(re.search(rf"\b{field}: ([\d.]+)", text)[1])

    minor = re.search(r"cuda_compute_capability \{[^}]*\bminor: (\d+)", text)
    # A fused multiply-add is two operations.
    vector_flops = 2 * number("core_count") * number("fpus_per_core") * number("clock_rate_ghz") * 1e9
    return Gpu(
        name=re.search(r'device_description_str: "([^"]*)"', text)[1],
        capability=(int(re.search(r"\bmajor: (\d+)", text)[1]), int(minor[1]) if minor else 0),
        product_flops=_PRODUCT_FLOPS[name],
        float32_flops=vector_flops,
        bandwidth=number("memory_bandwidth"),
        link_bandwidth=_LINK_BANDWIDTH[name],
        memory=int(number("device_memory_size")),
    )
