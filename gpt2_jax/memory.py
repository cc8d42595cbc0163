"""What a train step needs, as its compiler says."""

import contextlib
from collections.abc import Iterator

import jax

from gpt2_core.config import TrainConfig
from gpt2_core.errors import UserError
from gpt2_core.memory import host_memory, of_batch, out_of_memory
from gpt2_jax.model import Definition
from gpt2_jax.sharding import num_shards
from gpt2_jax.train_step import compile_train_step


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """Of one device: what comes in, what goes out and isn't written over it, and what lies between."""
    found = compiled.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + new + found.temp_size_in_bytes


def bytes_available(mesh: jax.sharding.Mesh) -> int:
    """On one device: of what XLA reserved there, or on CPU of the host's memory, which virtual devices share."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return host_memory() // mesh.size
    return device.memory_stats()["bytes_limit"]


def check_memory(
    compiled: jax.stages.Compiled, config: TrainConfig, definition: Definition, mesh: jax.sharding.Mesh
) -> None:
    """Raise UserError if the step can't but fail: on CPU the system would kill the process, without an error."""
    if bytes_needed(compiled) > bytes_available(mesh):
        raise _sentence(config, definition, mesh)


@contextlib.contextmanager
def memory_errors(config: TrainConfig, definition: Definition, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Turn XLA's running out of memory into a sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _sentence(config, definition, mesh) from error


def _sentence(config: TrainConfig, definition: Definition, mesh: jax.sharding.Mesh) -> UserError:
    shards = num_shards(mesh, "batch")

    def planner(sequences: int, accumulation: int) -> int:
        smaller = of_batch(config, sequences * shards, accumulation)
        return bytes_needed(compile_train_step(smaller, definition, mesh))

    device = mesh.devices.flat[0].device_kind
    return out_of_memory(config, planner, ways=shards, available=bytes_available(mesh), device=device)
