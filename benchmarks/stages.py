"""The stages of a campaign in order of value: what each runs, needs, and is expected to take."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.requirements import missing
from benchmarks.variants import FLAGS, VARIANTS, jax_side, torch_side
from gpt2_core.config import PRESETS, ModelConfig, TrainConfig
from gpt2_core.config.io import differences

# Packages that each side imports.
_JAX = ("jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "safetensors", "ml_dtypes")
_TORCH = ("torch", "grain", "safetensors", "ml_dtypes")
_BOTH = (*_JAX, "torch")

GROUPS = {
    "environment": "versions, GPU, and the rates that both frameworks reach on it",
    "train": "a train step of both frameworks, PyTorch with its flash attention and with cuDNN's",
    "profile": "kernels of each framework's step, by kind",
    "floor": "JAX's step beside the lower bound of its program",
    "variants": "JAX's step with other settings and kernels, beside the default",
    "sizes": "gpt2-medium, gpt2-large and gpt2-xl in both frameworks",
    "flags": "JAX's step with flags of XLA, beside the default",
    "generate": "prefill and decoding, beside transformers if it is installed",
    "parity": "parity/compare.py on the GPU",
    "overfit": "configs/shakespeare_overfit.yaml, timed",
}

# Sequences at once with which both sides fit in 80 and in 141 GB together: estimates, halved if they don't.
_BATCHES = {"gpt2-medium": (16, 32), "gpt2-large": (8, 16), "gpt2-xl": (2, 8)}
_LARGE = 100e9


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a campaign measures; its folder records them."""

    config: TrainConfig
    """The step; its precision may be auto."""
    rounds: int
    steps: int
    text: str | None
    """A file to overfit, instead of the bundled text."""
    target_loss: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """One measurement: `function` (module:name) is called with `spec` in its own process."""

    name: str
    group: str
    title: str
    function: str
    spec: dict[str, Any]
    seconds: float
    """Expected time on a GPU with nothing compiled before; an estimate."""
    needs: tuple[str, ...]


def stages(settings: Settings, folder: Path, records: Iterable[dict[str, Any]] = ()) -> list[Stage]:
    """All stages; `records` are the results so far, which show PyTorch's faster attention and the GPU's memory."""
    records = list(records)
    config, on_cpu = settings.config, settings.config.device == "cpu"
    turns = {"rounds": settings.rounds, "steps": settings.steps}
    attention = "auto" if on_cpu else faster_attention(records)
    step = {"config": dataclasses.asdict(config), "steps": settings.steps}
    device = {"device": config.device, "precision": config.precision}

    def pair(name: str, group: str, title: str, sides: list, seconds: float, needs: tuple[str, ...], **more) -> Stage:
        return Stage(name, group, title, "benchmarks.variants:compare", {"sides": sides} | turns | more, seconds, needs)

    def torch(kernel: str, of: TrainConfig = config) -> dict[str, Any]:
        return torch_side("torch", of, kernel, compile=not on_cpu)

    found = [Stage("environment", "environment", "environment", "benchmarks.campaign_commands:environment", device, 60,
                   ("jax", "torch"))]  # fmt: skip
    for kernel in ("auto",) if on_cpu else ("flash", "cudnn"):
        title = f"PyTorch with {'its own choice of' if kernel == 'auto' else kernel} attention"
        found.append(pair(f"train-{kernel}", "train", title, [jax_side("jax", config), torch(kernel)], 150, _BOTH))
    compiled = {"attention": attention, "compile": not on_cpu}
    found += [
        Stage("profile-jax", "profile", "JAX", "benchmarks.profile:jax_profile", step, 75, _JAX),
        Stage("profile-torch", "profile", "PyTorch", "benchmarks.profile:torch_profile", step | compiled, 90, _TORCH),
        Stage("floor", "floor", "least time", "benchmarks.profile:floor",
              step | {"program": str(folder / "program.txt")}, 75, _JAX),
    ]  # fmt: skip
    default = jax_side("default", config)
    for variant in VARIANTS:
        sides = [jax_side(variant.name, config, variant), default]
        found.append(pair(f"variant-{variant.name}", "variants", variant.what, sides, 110, _JAX))
    memory = _gpu_memory(records)
    for place, (preset, batches) in enumerate(_BATCHES.items()):
        sized = dataclasses.replace(
            config,
            model=ModelConfig(**PRESETS[preset], block_size=config.model.block_size),
            batch_size=batches[memory > _LARGE],
        )
        sides = [jax_side("jax", sized), torch(attention, sized)]
        found.append(pair(f"size-{preset}", "sizes", preset, sides, 180 + 60 * place, _BOTH, halve=True))
    for variant in FLAGS:
        title = f"{variant.what}: `{variant.flags}`"
        found.append(
            pair(f"flag-{variant.name}", "flags", title, [jax_side(variant.name, config, variant), default], 110, _JAX)
        )
    sides = "jax" if missing(["transformers"]) else "jax;transformers"
    for batch in (1, 32):
        arguments = ["--sides", sides, "--batch", str(batch), "--rounds", "3", "--device", config.device]
        arguments += ["--precision", config.precision]
        arguments += [f"--model.{name}={value}" for name, _, value in differences(ModelConfig(), config.model)]
        found.append(Stage(f"generate-{batch}", "generate", f"batch {batch}",
                           "benchmarks.campaign_commands:generation", {"arguments": arguments}, 90, _JAX))  # fmt: skip
    report = {"folder": str(folder / "parity"), "arguments": ["--quick", "--device", "cpu" if on_cpu else "gpu"]}
    run = {"folder": str(folder / "overfit"), "text": settings.text, "target_loss": settings.target_loss}
    run |= {"arguments": []}
    found += [
        Stage("parity", "parity", "parity", "benchmarks.campaign_commands:parity", report, 150, (*_BOTH, "Jinja2")),
        Stage("overfit", "overfit", "overfit", "benchmarks.campaign_commands:overfit", run, 240,
              (*_JAX, "matplotlib")),
    ]  # fmt: skip
    return found


def faster_attention(records: Iterable[dict[str, Any]]) -> str:
    """PyTorch's attention kernel with the shorter step; flash until both are measured."""
    seconds = {}
    for record in records:
        if record["group"] == "train" and record["status"] == "done":
            seconds[record["stage"].removeprefix("train-")] = record["results"]["sides"][1]["step_seconds"]
    return min(seconds, key=seconds.get, default="flash")


def _gpu_memory(records: Iterable[dict[str, Any]]) -> float:
    """Bytes, from the driver; 80 GB until it is known."""
    for record in records:
        gpu = record["stage"] == "environment" and record["status"] == "done" and record["results"]["gpu"]
        if gpu and gpu["memory.total"].endswith("MiB"):
            return float(gpu["memory.total"].removesuffix("MiB")) * 2**20
    return 80e9
