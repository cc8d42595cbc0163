"""deploy/slurm.sbatch under a faked SLURM: `srun` starts the processes here, with the variables that SLURM sets."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

SRUN = """#!{python}
import os, signal, subprocess, sys
arguments = sys.argv[1:]
split = next(number for number, argument in enumerate(arguments) if not argument.startswith("--"))
options, command = dict(a[2:].split("=") for a in arguments[:split]), arguments[split:]
nodes, each = int(os.environ["SLURM_JOB_NUM_NODES"]), int(options["ntasks-per-node"])
step = {{"SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": str(nodes * each)}}
tasks = [
    subprocess.Popen(command, env=os.environ | step | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % each)}})
    for n in range(nodes * each)
]
for number in (signal.SIGUSR1, signal.SIGTERM):  # which SLURM sends to the tasks
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
print("tasks", len(tasks), "cpus", options["cpus-per-task"], flush=True)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> scontrol.txt\n'


@pytest.fixture
def sbatch(tmp_path, root, environment):
    """Start the script as SLURM would start it on so many nodes of so many GPUs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(random.randrange(1, 1 << 20)),
        "SLURM_JOB_NAME": "gpt2",
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_CPUS_ON_NODE": "8",
    }

    def sbatch(*arguments, nodes=2, gpus=8, **variables):
        sizes = {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus)}
        command = ["bash", str(root / "deploy" / "slurm.sbatch"), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment | job | sizes | variables, **pipes)

    return sbatch


def steps(path):
    return [row["step"] for row in map(json.loads, path.read_text().splitlines()) if row["split"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "cpus"), [({}, 8), ({"nodes": 1, "gpus": 2, "PER_GPU": "1"}, 4)])
def test_a_preempted_job_is_requeued_and_continues(sbatch, shape, cpus, recipe, tmp_path):
    """One process on each of two nodes, or one for each of two GPUs."""
    arguments = (
        "--config",
        recipe,
        "--mesh",
        "2",
        "--optimizer.final_fraction",
        "1",
        "--checkpoint_interval",
        "1000000",
    )
    first = sbatch(*arguments, "--steps", "1000000", RUN_DIR="run", **shape)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 4):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    (srun,) = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(srun), signal.SIGUSR1)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 75 and f"tasks 2 cpus {cpus}" in out, err
    (saved,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert (tmp_path / "scontrol.txt").read_text().startswith("requeue ")
    # SLURM starts the same script again.
    again = sbatch(*arguments, "--steps", saved + 3, RUN_DIR="run", SLURM_RESTART_COUNT="1", **shape)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and err == "", err
    assert f"from step {saved}" in out and steps(metrics) == list(range(saved + 3))
    assert (tmp_path / "scontrol.txt").read_text().count("requeue") == 1


def test_what_cannot_be_done_is_not_requeued(sbatch, recipe, tmp_path):
    job = sbatch("--config", recipe, "--mesh", "3", nodes=2)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 2, err
    assert err.count("error: --mesh data=3: ") == 2
    assert not (tmp_path / "scontrol.txt").exists() and not (tmp_path / "runs").exists()
