"""Rates that a device reaches in either framework: FLOP/s of a large square matrix product, bytes/s of a pass over
memory.

Operands are random: a GPU multiplies zeros and ones faster than numbers whose bits vary.
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.measure import Session
from gpt2_core.config import dtype_of
from gpt2_core.errors import UserError

# Rows of the square matrices, and numbers in the array that is read and written: large enough to fill the device.
_MATMUL = {"cpu": 2048, "gpu": 8192}
_NUMBERS = {"cpu": 1 << 25, "gpu": 1 << 29}


def jax_matmul(precision: str, platform: str) -> float:
    """FLOP/s of a square product in this dtype."""
    import jax
    import jax.numpy as jnp

    n = _MATMUL["cpu" if platform == "cpu" else "gpu"]
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.float32).astype(dtype_of(precision))
    multiply = jax.jit(lambda a, b: a @ b)
    return 2 * n**3 / fastest(lambda: multiply(a, b).block_until_ready())


def torch_matmul(precision: str, device) -> float:
    """FLOP/s of a square product in this dtype."""
    import torch

    n = _MATMUL["cpu" if device.type == "cpu" else "gpu"]
    a, b = torch.randn((2, n, n), device=device).to(getattr(torch, dtype_of(precision)))
    return 2 * n**3 / fastest(lambda: _wait(a @ b))


def jax_bandwidth(platform: str) -> float:
    """Bytes/s, read and written together, of adding 1 to a large float32 array."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(_NUMBERS["cpu" if platform == "cpu" else "gpu"], jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / fastest(lambda: add(x).block_until_ready())


def torch_bandwidth(device) -> float:
    """Bytes/s, read and written together, of adding 1 to a large float32 array."""
    import torch

    x = torch.zeros(_NUMBERS["cpu" if device.type == "cpu" else "gpu"], device=device)
    return 2 * x.numel() * x.element_size() / fastest(lambda: _wait(x + 1))


def jax_session(spec: dict[str, Any]) -> Session:
    import jax

    if spec["device"] == "cpu":
        jax.config.update("jax_platforms", "cpu")
    from gpt2_jax.runtime import configure, resolve_precision

    configure(spec["precision"], 1)
    device = jax.devices()[0]
    if spec["device"] == "cuda" and device.platform == "cpu":
        raise UserError("--device cuda: JAX finds no GPU here; use --device cpu")
    precision = resolve_precision(spec["precision"])
    rates = {"matmul_flops": jax_matmul(precision, device.platform), "bandwidth": jax_bandwidth(device.platform)}
    return Session({"device": device.device_kind, "precision": precision} | rates, lambda units: None)


def torch_session(spec: dict[str, Any]) -> Session:
    import torch

    from gpt2_torch.runtime import pick_device, resolve_precision, set_matmul_precision

    device = pick_device(spec["device"])
    precision = resolve_precision(spec["precision"], device)
    set_matmul_precision(precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rates = {"matmul_flops": torch_matmul(precision, device), "bandwidth": torch_bandwidth(device)}
    return Session({"device": name, "precision": precision} | rates, lambda units: None)


def fastest(work: Callable[[], Any]) -> float:
    """Least seconds of five calls, after one that warms up."""
    work()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def _wait(result) -> None:
    if result.is_cuda:
        import torch

        torch.cuda.synchronize()
