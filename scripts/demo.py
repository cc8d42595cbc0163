"""The whole workflow in a few minutes: train on a mesh, compare with PyTorch, generate with both (`make demo`)."""

import itertools
import shlex
import subprocess
import sys
import time
from pathlib import Path

from gpt2_core.cli import Parser, run
from gpt2_core.errors import RunError

PROMPT = "def "
VIRTUAL_DEVICES = 8  # on a machine without accelerators, so that the demo trains on a mesh there too


def main(arguments: list[str]) -> None:
    parser = Parser(prog="demo.py", description="Train the quickstart recipe, compare, generate.")
    parser.add_argument(
        "--mesh",
        type=str,
        help=f"Devices to train on, as train_jax.py's --mesh. Left out: all accelerators, else {VIRTUAL_DEVICES} "
        "virtual CPU devices.",
    )
    options = parser.parse(arguments)
    mesh = options.mesh or (None if _has_accelerator() else str(VIRTUAL_DEVICES))
    run_dir = _free_folder(Path("runs/demo"))
    if run_dir.name != "demo":
        print(f"found the runs of earlier demos beside {run_dir}; training again into {run_dir}")
    report = Path("parity_report")
    start = time.perf_counter()
    on_mesh = ("--mesh", mesh) if mesh else ()  # without it train_jax.py takes all accelerators
    _step("train in JAX", "scripts/train_jax.py", *on_mesh, "--run_dir", str(run_dir))
    _step(
        "compare with PyTorch on the trained weights",
        "parity/compare.py", "--quick", "--weights", str(run_dir), "--report", str(report),
    )  # fmt: skip
    for backend in ("jax", "torch"):
        _step(
            f"generate with {backend}",
            "scripts/generate.py", "--weights", str(run_dir), "--prompt", PROMPT, "--backend", backend,
            "--temperature", "0.7",
        )  # fmt: skip
    print(f"\ndone in {(time.perf_counter() - start) / 60:.1f} minutes:")
    for what, path in (
        ("configuration", run_dir / "config.yaml"),
        ("metrics", run_dir / "metrics.jsonl"),
        ("curves", run_dir / "curves.png"),
        ("samples", run_dir / "samples"),
        ("checkpoints", run_dir / "checkpoints"),
        ("parity report", report / "index.html"),
        ("its figures", report / "report.json"),
    ):
        print(f"  {what:14} {path}")


def _has_accelerator() -> bool:
    # In another process: JAX reserves most of a GPU's memory once it has looked for devices.
    program = "from gpt2_jax.runtime import has_accelerator; print(has_accelerator())"
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise RunError(f"demo: JAX doesn't find its devices (exit code {found.returncode}); its message is above")
    return found.stdout.strip() == "True"


def _free_folder(base: Path) -> Path:
    numbered = (base.with_name(f"{base.name}-{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([base], numbered) if not path.exists())


def _step(what: str, *command: str) -> None:
    print(f"\n== {what}: python {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        raise RunError(f"demo: '{what}' ended with exit code {code}; its message is above")


if __name__ == "__main__":
    run(main)
