"""Compile a train step for a GPU, without one: python -m benchmarks.gpu_program SPEC.json FOLDER

Runs in the environment that benchmarks.compiler_env makes, which has JAX's CUDA plugin. Writes the optimized program's
text to FOLDER/program.txt and the compiler's figures of its memory to FOLDER/facts.json.
"""

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

from gpt2_core.cli import run
from gpt2_core.config.io import from_dict
from gpt2_jax.mesh import parse_mesh


def main(arguments: list[str]) -> None:
    spec, folder = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    compiled = _compile(spec)
    memory = compiled.memory_analysis()
    facts = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }
    (folder / "program.txt").write_text(compiled.as_text())
    (folder / "facts.json").write_text(json.dumps(facts))


def _compile(spec: dict[str, Any]) -> Any:
    """The trainer's own step: `spec` holds the configuration, the target's description and its compute capability."""
    from jax.experimental import topologies

    from gpt2_jax.train_step import make_program

    _answer_for_the_driver(tuple(spec["capability"]))
    config = from_dict(spec["config"])
    shape = f"1x1x{math.prod(parse_mesh(config.mesh).values())}"
    topology = topologies.get_topology_desc(platform="cuda", target_config=spec["target"], topology=shape)
    return make_program(config, list(topology.devices)).compile_train_step()


def _answer_for_the_driver(capability: tuple[int, int]) -> None:
    """JAX asks the driver whether cuDNN supports this attention. Without a driver, answer for the target, with cuDNN
    9.10.1."""
    import jax._src.cudnn.fused_attention_stablehlo as cudnn

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split("."))

    cudnn.check_cudnn_version = lambda: 91001
    cudnn.check_compute_capability = lambda least: capability >= version(least)
    cudnn.is_cuda_compute_capability_equal = lambda other: capability == version(other)


if __name__ == "__main__":
    run(main)
