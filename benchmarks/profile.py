"""Stages of a campaign that analyse one framework's step: its kernels by kind, and the lower bound of its time."""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import JaxTraining, TorchTraining
from benchmarks.hlo_account import account
from benchmarks.kernels import Kernel, from_chrome_trace, from_xspace, profile, sources_of
from benchmarks.runner import Skip
from gpt2_core.config.io import from_dict
from gpt2_core.errors import RunError
from gpt2_core.files import write_atomically
from gpt2_jax.planning import gpus

# Steps before the first that is timed, and how many of the largest groups are kept.
_WARM, _TOP = 5, 40


def jax_profile(spec: dict[str, Any]) -> dict[str, Any]:
    """Where JAX's step spends its time."""
    import jax

    if not hasattr(jax.profiler, "ProfileData"):
        raise Skip(f"jax {jax.__version__} has no jax.profiler.ProfileData, which reads a trace")
    training = JaxTraining(from_dict(spec["config"]), cached=True)
    seconds = _seconds_a_step(training, spec["steps"])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            training.work(spec["steps"])
        files = list(Path(folder).rglob("*.xplane.pb"))
        if not files:
            raise Skip("JAX's profiler left no trace")
        space = jax.profiler.ProfileData.from_file(str(files[0]))
        try:
            kernels = from_xspace(space, sources_of(training.step.as_text()))
        except LookupError as reason:
            raise Skip(str(reason)) from reason
    return {"device": jax.devices()[0].device_kind} | _summed(kernels, spec["steps"], seconds)


def torch_profile(spec: dict[str, Any]) -> dict[str, Any]:
    """Where PyTorch's step spends its time."""
    import torch

    training = TorchTraining(from_dict(spec["config"]), compile=spec["compile"], attention=spec["attention"])
    if training.device.type != "cuda":
        raise Skip("PyTorch has no GPU here to profile")
    seconds = _seconds_a_step(training, spec["steps"])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=activities) as recorded:
            training.work(spec["steps"])
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        kernels = from_chrome_trace(json.loads(trace.read_text(encoding="utf-8")))
    return {"device": torch.cuda.get_device_name(training.device)} | _summed(kernels, spec["steps"], seconds)


def floor(spec: dict[str, Any]) -> dict[str, Any]:
    """JAX's step beside the lower bound of the program compiled for this GPU."""
    import jax

    training = JaxTraining(from_dict(spec["config"]), cached=True)
    device = jax.devices()[0].device_kind
    target = gpus.target_of(device)
    if target is None:
        raise Skip(f"gpt2_jax/planning/targets has no description of {device}")
    text = training.step.as_text()
    write_atomically(Path(spec["program"]), text)
    found = account(text, gpus.load(target))
    found = dataclasses.replace(found, groups=found.groups[:_TOP], products=found.products[:_TOP])
    seconds = _seconds_a_step(training, spec["steps"])
    return {"device": device, "step_ms": 1e3 * seconds} | dataclasses.asdict(found)


def _seconds_a_step(training: JaxTraining | TorchTraining, steps: int) -> float:
    training.work(_WARM)
    begin = time.perf_counter()
    training.work(steps)
    return (time.perf_counter() - begin) / steps


def _summed(kernels: list[Kernel], steps: int, seconds: float) -> dict[str, Any]:
    if not kernels:
        raise RunError("the trace of the GPU has no kernels; check that the profiler may read the GPU's counters")
    return dataclasses.asdict(profile(kernels, steps=steps, step_seconds=seconds))
