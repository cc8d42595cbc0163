import runpy
import subprocess
from types import SimpleNamespace

import pytest

DEMO = "scripts/demo.py"


@pytest.mark.parametrize(
    ("arguments", "accelerator", "mesh"),
    [
        ([], True, None),  # train_jax.py then takes every accelerator
        ([], False, "8"),
        (["--mesh", "2"], True, "2"),
        (["--mesh", "2"], False, "2"),
    ],
)
def test_the_demo_trains_on_what_is_there(arguments, accelerator, mesh, root, tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command[1:])
        return SimpleNamespace(returncode=0, stdout=f"{accelerator}\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(root / DEMO))["main"](arguments)
    (train,) = (command for command in commands if command[0] == "scripts/train_jax.py")
    assert train[1:] == [*(["--mesh", mesh] if mesh else []), "--run_dir", "runs/demo"]


def test_the_demo_asks_jax_itself_for_accelerators(root):
    assert runpy.run_path(str(root / DEMO))["_has_accelerator"]() is False  # the tests run on the CPU


def test_make_demo_leaves_the_mesh_out_unless_it_is_given(root):
    def command(*variables):
        done = subprocess.run(["make", "--dry-run", "demo", *variables], cwd=root, capture_output=True, text=True)
        return next(line for line in done.stdout.splitlines() if DEMO in line).partition(DEMO)[2].strip()

    assert command() == ""
    assert command("MESH=data=2,fsdp=2") == "--mesh data=2,fsdp=2"
