"""The memory that a train step needs, as its compiler reports it, and the error for a step that needs too much."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from gpt2_core.config import ResolvedConfig
from gpt2_core.errors import UserError
from gpt2_core.memory import check_state, host_memory, of_batch, out_of_memory
from gpt2_jax.mesh import parse_mesh
from gpt2_jax.sharding import make_mesh, num_shards
from gpt2_jax.train_step import Program


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """On one device: arguments, outputs that don't reuse an argument's memory, and temporaries."""
    found = compiled.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + new + found.temp_size_in_bytes


def bytes_available(mesh: jax.sharding.Mesh, processes: int = 1) -> int:
    """On one of this process's devices: of what XLA reserved there, or on CPU of the host's memory, which the virtual
    devices of this host's `processes` share."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return host_memory() // (len(mesh.local_devices) * processes)
    return device.memory_stats()["bytes_limit"]


def check_memory(compiled: jax.stages.Compiled, program: Program, processes: int = 1) -> None:
    """Raise UserError if the step is sure to fail: on CPU the system would kill the process, without an error.

    `processes` are those of the run on this host.
    """
    if bytes_needed(compiled) > bytes_available(program.mesh, processes):
        raise _out_of_memory(program, processes)


def check_state_fits(config: ResolvedConfig, processes: int = 1) -> None:
    """Raise UserError if parameters and moments don't fit on the mesh's devices; `processes` as above."""
    mesh = make_mesh(parse_mesh(config.mesh))
    sharing, kind = mesh.shape["fsdp"] * mesh.shape["tensor"], mesh.local_devices[0].device_kind
    check_state(config, num_shards=sharing, available=bytes_available(mesh, processes), device=kind)


@contextlib.contextmanager
def memory_errors(program: Program, processes: int = 1) -> Iterator[None]:
    """Turn XLA's out-of-memory errors into a UserError with a suggested batch size."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _out_of_memory(program, processes) from error


def _out_of_memory(program: Program, processes: int) -> UserError:
    config, mesh = program.config, program.mesh
    shards = num_shards(mesh, "batch")

    # Processes of a run share the search for the fastest kernels on GPUs; here one may be compiling without the others.
    alone = {"xla_gpu_shard_autotuning": False} if jax.process_count() > 1 else None

    def planner(sequences: int, accumulation: int) -> int:
        smaller = dataclasses.replace(program, config=of_batch(config, sequences * shards, accumulation))
        return bytes_needed(smaller.compile_train_step(alone))

    device = mesh.local_devices[0].device_kind
    return out_of_memory(config, planner, num_shards=shards, available=bytes_available(mesh, processes), device=device)
