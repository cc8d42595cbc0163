import sys
import types

import pytest

from gpt2_core.errors import UserError
from gpt2_jax.launch import Launch, Place, check_devices, find_place

VARIABLES = (
    "SLURM_",
    "OMPI_",
    "KUBERNETES_",
    "JOB_COMPLETION",
    "MASTER_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "JAX_COORD",
)
SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "node[003-004,9],other1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
TORCHRUN = {"MASTER_ADDR": "head", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1"}


@pytest.fixture
def detected(monkeypatch):
    def detected(variables):
        import os

        for name in list(os.environ):
            if name.startswith(VARIABLES):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_place(Launch(distributed="auto"))

    return detected


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (SLURM, Place(f"node003:{70001 % 4096 + 61440}", 4, 2)),
        (OPEN_MPI, Place(f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 8, 5)),
        (TORCHRUN, Place("head:29500", 16, 9)),
        # torchrun's agent listens at MASTER_PORT itself.
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, Place("head:29501", 16, 9)),
        (SLURM | {"JAX_COORDINATOR_PORT": "1234"}, Place("node003:1234", 4, 2)),
        # What SLURM has started has started these processes.
        (SLURM | OPEN_MPI, Place(f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 8, 5)),
        (SLURM | TORCHRUN, Place("head:29500", 16, 9)),
        # sbatch scripts often set these two for PyTorch.
        (SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1"}, Place(f"node003:{70001 % 4096 + 61440}", 4, 2)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # mpirun in a pod
        (
            OPEN_MPI | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            Place(f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 8, 5),
        ),
    ],
)
def test_auto_finds_what_the_launcher_says(detected, variables, place):
    assert detected(variables) == place


def test_auto_asks_the_cluster_in_kubernetes(detected, monkeypatch):
    def named(**fields):
        return types.SimpleNamespace(**fields)

    labels = {"job-name": "gpt2-workers-0", "jobset.sigs.k8s.io/jobset-name": "gpt2"}
    pod = named(metadata=named(labels=labels, owner_references=[named(controller=True, kind="Job")]))
    job = named(metadata=named(name="gpt2-workers-0", labels=labels), spec=named(parallelism=2))
    from jax._src.clusters import K8sCluster

    monkeypatch.setitem(sys.modules, "kubernetes", named(__spec__=named()))
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(K8sCluster, "_pod", lambda: pod)
    monkeypatch.setattr(K8sCluster, "_job", lambda: job)
    monkeypatch.setattr(K8sCluster, "_controller", lambda: pod.metadata.owner_references[0])
    found = detected({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    assert found == Place("gpt2-workers-0-0.gpt2:55527", 2, 1)
    with pytest.raises(
        UserError, match="what Kubernetes tells of the processes can't be read .*Indexed.*; give --coord"
    ):
        detected({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})


def test_auto_says_what_it_needs(detected, monkeypatch):
    with pytest.raises(UserError, match="--distributed auto: nothing tells this process of others"):
        detected({})
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError, match="in Kubernetes this needs the package kubernetes; pip install"):
        detected({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    with pytest.raises(
        UserError, match="what SLURM tells of the processes can't be read .*'two'.*; give --coordinator"
    ):
        detected(SLURM | {"SLURM_NTASKS": "two"})


def test_left_out_there_is_one_process():
    assert find_place(Launch()) is None
    assert find_place(Launch(coordinator="a:1", processes=1, process_id=0)) is None
    assert find_place(Launch(coordinator="[::1]:8476", processes=2, process_id=1)) == Place("[::1]:8476", 2, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distributed": "auto", "processes": 2}, "--distributed auto --processes 2: auto finds these itself"),
        ({"processes": 2}, "--processes 2: processes started by hand need --coordinator and --process_id too"),
        ({"coordinator": "a:1", "process_id": 0}, "need --processes too"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "--coordinator a: expected HOST:PORT"),
        ({"coordinator": "a:70000", "processes": 2, "process_id": 0}, "--coordinator a:70000: expected HOST:PORT"),
        ({"coordinator": ":" + "9" * 5000, "processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": "a:1", "processes": 0, "process_id": 0}, "--processes 0: must be at least 1"),
        ({"coordinator": "a:1", "processes": 2, "process_id": -1}, "--process_id -1: with --processes 2"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options, words):
    with pytest.raises(UserError) as raised:
        Launch(**options)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_mesh_must_be_shared_equally():
    check_devices("data=2,fsdp=4", 4)
    check_devices(None, 3)
    with pytest.raises(
        UserError, match="--mesh data=6: its 6 devices can't be shared equally by 4 processes; use a mesh"
    ):
        check_devices("data=6", 4)
