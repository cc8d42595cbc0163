"""JAX's process-wide settings, made before its first use of a device, and the devices of a run."""

import contextlib
import hashlib
import math
import os
import platform
from pathlib import Path

import jax

from gpt2_core.config import TrainConfig
from gpt2_core.errors import UserError
from gpt2_jax.compilation_cache import keep_compiled_programs
from gpt2_jax.mesh import parse_mesh

# Each takes memory and threads; a mesh of more is one of real devices, or is refused for want of them.
_MOST_VIRTUAL_DEVICES = 1024


def configure(
    precision: str, mesh: int | str | None = None, processes: int = 1, *, deterministic: bool = False
) -> None:
    """Prepare JAX for one of the `processes` that compute in `precision` on `mesh`. Call it before anything touches a
    device, and after the processes are connected.

    Lets JAX have most of a GPU's memory (its default is three quarters; the user's own XLA_CLIENT_MEM_FRACTION wins).
    Makes as many virtual CPU devices as the mesh needs (they stay unused where there are accelerators), switches
    float64 on for float64 alone (with it on, stray numpy scalars turn float32 arrays into float64), has
    float32 matrix products done in TF32 for tf32 alone, as PyTorch does, and has compiled programs kept on disk.
    Raises UserError for a precision that this machine doesn't have.
    """
    _take_gpu_memory()
    if deterministic:
        # Read when XLA first compiles. What it has no deterministic kernel for is then an error.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_exclude_nondeterministic_ops=true"
        os.environ["XLA_FLAGS"] = flags.strip()
    cpu_devices = 1 if mesh is None else math.prod(parse_mesh(mesh).values()) // processes
    jax.config.update("jax_num_cpu_devices", min(cpu_devices, _MOST_VIRTUAL_DEVICES))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # between processes; one has none
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", matmul_precision(resolve_precision(precision)))
    # On GPUs, processes that compile share the search for the fastest kernels; one that finds its program on its disk
    # doesn't, and the others would wait for it.
    if processes == 1 or not has_accelerator():
        _keep_compiled_programs()


def compilation_cache() -> Path:
    """The folder of the compilation cache, unless JAX_COMPILATION_CACHE_DIR is set."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return caches / "gpt2-jax" / f"programs-{platform.machine()}-{_processor()}"


def _take_gpu_memory() -> None:
    # The second is what the first was once called. JAX refuses both at once.
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"  # the rest is for CUDA, its libraries and NCCL


def _keep_compiled_programs() -> None:
    if jax.config.jax_compilation_cache_dir is not None:
        return
    with contextlib.suppress(OSError):  # if home isn't writable, every process compiles again
        keep_compiled_programs(compilation_cache())


def _processor() -> str:
    """Identifies the kind of CPU: JAX's cache key has the program alone, and home folders are shared by machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        return hashlib.sha256("".join(kind).encode()).hexdigest()[:8]
    return platform.processor() or "cpu"


def has_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def nvidia_capability() -> float | None:
    """The compute capability of the NVIDIA GPU that JAX computes on, None if it computes on something else."""
    device = jax.devices()[0]
    if jax.default_backend() != "gpu" or "NVIDIA" not in device.device_kind:
        return None
    return float(device.compute_capability)


def why_not_ampere() -> str | None:
    """Why a kernel for NVIDIA GPUs since Ampere can't run here; None if it can."""
    capability = nvidia_capability()
    if capability is None:
        return "needs an NVIDIA GPU, and JAX finds none here"
    if capability < 8.0:
        return f"needs compute capability 8.0, and this {jax.devices()[0].device_kind} has {capability}"
    return None


def resolve_precision(precision: str) -> str:
    """What `auto` means on this machine; raises UserError for tf32 where there is none."""
    if precision == "auto":
        return "bfloat16" if has_accelerator() else "float32"
    if precision == "tf32" and (nvidia_capability() or 0.0) < 8.0:
        raise UserError(
            f"--precision tf32: needs an NVIDIA GPU of compute capability 8.0 or newer (Ampere), and JAX computes on "
            f"{jax.devices()[0].device_kind} here; use float32"
        )
    return precision


def matmul_precision(precision: str) -> str | None:
    """JAX's name for the precision of float32 matrix products in a resolved precision; None where there are none."""
    return {"bfloat16": None, "tf32": "tensorfloat32"}.get(precision, "highest")


def resolve_mesh(config: TrainConfig) -> dict[str, int]:
    """Sizes of the mesh's axes: those asked for, or all accelerators, or one CPU device a process."""
    processes = jax.process_count()
    if config.mesh is None:
        return parse_mesh(len(jax.devices()) if has_accelerator() else processes)
    sizes = parse_mesh(config.mesh)
    needed, found = math.prod(sizes.values()), len(jax.devices())
    if processes > 1 and needed != found:
        raise UserError(
            f"--mesh {config.mesh}: needs {needed} devices, and the {processes} processes have {found} together "
            f"({jax.devices()[0].device_kind}), of which none may be idle; use a mesh of {found}, or other processes"
        )
    if needed > found:
        kind = jax.devices()[0].device_kind
        raise UserError(
            f"--mesh {config.mesh}: needs {needed} devices and this machine has {found} ({kind}); use a mesh of at "
            f"most {found}, or set JAX_PLATFORMS=cpu to try it on virtual CPU devices"
        )
    return sizes
