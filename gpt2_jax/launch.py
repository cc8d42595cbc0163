"""Where a process finds the others of its run: the launch options, and what SLURM, Kubernetes, Open MPI and torchrun
tell it.

These options are no settings of a run, and aren't in its config.yaml: they say where it computes, like torchrun's own
options, and differ from process to process. A run resumed elsewhere is given others.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from gpt2_core.config import divisors, one_of
from gpt2_core.errors import UserError
from gpt2_jax.mesh import parse_mesh

T = TypeVar("T")

_BY_HAND = "give --coordinator, --processes and --process_id"
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")


@dataclass(frozen=True)
class Launch:
    """How the processes of a run find each other; left out, there is one process."""

    distributed: Literal["auto"] | None = None
    """auto: several processes, on one host or many, that SLURM, Kubernetes, Open MPI or torchrun has started. The run's
    folder must be on a file system that all of them see."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where it listens and the others connect, if they are started by hand."""
    processes: int | None = None
    """Number of processes, if they are started by hand; all are given the same."""
    process_id: int | None = None
    """Number of this process, from 0, if they are started by hand."""

    def __post_init__(self) -> None:
        given = {"--coordinator": self.coordinator, "--processes": self.processes, "--process_id": self.process_id}
        missing = [name for name, value in given.items() if value is None]
        typed = " ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        if self.distributed and typed:
            raise UserError(f"--distributed {self.distributed} {typed}: auto finds these itself; give one or the other")
        if typed and missing:
            raise UserError(f"{typed}: processes started by hand need {' and '.join(missing)} too; add what is missing")
        if not typed:
            return
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16):
            raise UserError(f"--coordinator {self.coordinator}: expected HOST:PORT of process 0, like node1:8476")
        if self.processes < 1:
            raise UserError(f"--processes {self.processes}: must be at least 1")
        if not 0 <= self.process_id < self.processes:
            raise UserError(
                f"--process_id {self.process_id}: with --processes {self.processes} they are numbered from 0 to "
                f"{self.processes - 1}"
            )


@dataclass(frozen=True)
class Place:
    """Which process of a run this is, and where process 0 listens."""

    coordinator: str
    processes: int
    process_id: int


def find_place(launch: Launch) -> Place | None:
    """This process's place among several; None if the run has one process.

    Raises UserError if it was to be detected, and can't be.
    """
    if launch.distributed:
        place = _detected()
    elif launch.coordinator is not None:
        place = Place(launch.coordinator, launch.processes, launch.process_id)
    else:
        return None
    return place if place.processes > 1 else None


def check_devices(mesh: int | str | None, processes: int) -> None:
    """Raise UserError for a mesh that these processes can't share equally."""
    devices = processes if mesh is None else math.prod(parse_mesh(mesh).values())
    if devices % processes:
        raise UserError(
            f"--mesh {mesh}: its {devices} devices can't be shared equally by {processes} processes; use a mesh of a "
            f"multiple of {processes}, or start {one_of(divisors(devices))} processes"
        )


def _detected() -> Place:
    # The innermost first: SLURM may have started mpirun or torchrun, which then started this process.
    if os.environ.keys() >= set(_TORCHRUN):
        return _read("torchrun", _of_torchrun)
    from jax._src import clusters

    port = os.environ.get("JAX_COORDINATOR_PORT")
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ
    known = {"Open MPI": clusters.OmpiCluster, "SLURM": clusters.SlurmCluster, "Kubernetes": clusters.K8sCluster}
    for name, cluster in known.items():
        if name == "Kubernetes" and in_kubernetes and importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "--distributed auto: in Kubernetes this needs the package kubernetes; pip install 'gpt2-jax[k8s]', or "
                f"{_BY_HAND}, as deploy/jobset.yaml does"
            )
        if _read(name, cluster.is_env_present):
            return _read(
                name,
                lambda cluster=cluster: Place(
                    cluster.get_coordinator_address(timeout_secs=None, override_coordinator_port=port),
                    cluster.get_process_count(),
                    cluster.get_process_id(),
                ),
            )
    raise UserError(
        "--distributed auto: nothing tells this process of others: no variables of SLURM (srun), Kubernetes, Open MPI "
        f"(mpirun) or torchrun ({', '.join(_TORCHRUN)}) are set here; start it by one of these, or {_BY_HAND}"
    )


def _of_torchrun() -> Place:
    # torchrun's agent listens at MASTER_PORT itself; other launchers that set these variables leave it free.
    taken = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = int(os.environ["MASTER_PORT"]) + taken
    return Place(f"{os.environ['MASTER_ADDR']}:{port}", int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))


def _read(name: str, of: Callable[[], T]) -> T:
    try:
        return of()
    except Exception as error:  # Kubernetes' client raises its own types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--distributed auto: what {name} tells of the processes can't be read ({reason}); {_BY_HAND}"
        ) from error
