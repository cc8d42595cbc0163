"""The virtual environment with JAX's compiler for NVIDIA GPUs: made on first use, remade when its versions change.

It is separate because JAX's CUDA plugin prints a traceback at every start on a machine without a GPU.
"""

import contextlib
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from gpt2_core.errors import RunError
from gpt2_core.files import write_atomically

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-compiled"
# What compiling the JAX trainer's step imports.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "safetensors", "tiktoken",
             "numpy", "ml_dtypes", "jsonargparse[signatures]", "PyYAML", "rich")  # fmt: skip
# In jaxlib's version of constraints.txt: jax 0.11 refuses to lower a Triton kernel without a GPU. Installed without the
# CUDA libraries that they depend on, since nothing is run: 183 MB.
_PLUGIN = ("jax-cuda12-plugin", "jax-cuda12-pjrt")


def environment(console: Console, folder: Path = FOLDER) -> Path:
    """The environment's Python; raises RunError if the environment isn't there and can't be made."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    stamp, wanted = folder / "complete", _stamp(constraints)
    python = folder / "bin" / "python"
    with _one_at_a_time(folder.parent):
        # Without the stamp the environment is incomplete; with another stamp it holds other versions.
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return python
        console.print(f"making {folder.name}, once: JAX with its compiler for NVIDIA GPUs, about 0.5 GB to download")
        shutil.rmtree(folder, ignore_errors=True)
        plugin = [f"{name}=={_pinned(constraints, 'jaxlib')}" for name in _PLUGIN]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "--disable-pip-version-check",
            "install",
            "--quiet",
        ]
        _run(console, folder, "creating", [sys.executable, "-m", "venv", "--without-pip", str(folder)])
        _run(console, folder, "installing JAX", [*pip, "--constraint", str(ROOT / "constraints.txt"), *_PACKAGES])
        _run(console, folder, "installing the CUDA plugin", [*pip, "--no-deps", *plugin])
        write_atomically(stamp, wanted)
    return python


def _stamp(constraints: str) -> str:
    """The versions that the environment holds."""
    names = [re.sub(r"\[.*", "", package) for package in _PACKAGES]
    pinned = [f"{name}=={_pinned(constraints, name)}" for name in names]
    return "\n".join([f"python=={platform.python_version()}", *pinned, *_PLUGIN, ""])


def _pinned(constraints: str, name: str) -> str:
    return re.search(rf"^{re.escape(name)}==(\S+)", constraints, re.M | re.I)[1]


def _run(console: Console, folder: Path, what: str, command: list[str]) -> None:
    with console.status(f"{folder.name}: {what}"):
        ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip().splitlines() or ["no reason given"]
        reason = next((line for line in reversed(said) if line.startswith("ERROR: ")), said[-1])
        raise RunError(
            f"{folder.name} can't be made, {what} failed: {reason.removeprefix('ERROR: ')}; making it needs pip and a "
            "package index: try again with both"
        )


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time make the environment."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)
