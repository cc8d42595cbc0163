"""The whole road in a few minutes: train on a mesh, compare with PyTorch, generate from both. `make demo` runs it."""

import itertools
import shlex
import subprocess
import sys
import time
from pathlib import Path

from gpt2_core.cli import Parser, run
from gpt2_core.errors import RunError

PROMPT = "def "


def main(arguments: list[str]) -> None:
    parser = Parser(prog="demo.py", description="Train the quickstart recipe, compare, generate.")
    parser.add_argument("--mesh", type=str, default="8", help="Devices to train on, as train_jax.py's --mesh.")
    options = parser.parse(arguments)
    run_dir = _free_folder(Path("runs/demo"))
    if run_dir.name != "demo":
        print(f"found the runs of earlier demos beside {run_dir}; training anew into {run_dir}")
    report = Path("parity_report")
    start = time.perf_counter()
    _step("train in JAX", "scripts/train_jax.py", "--mesh", options.mesh, "--run_dir", str(run_dir))
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
        ("checkpoints", run_dir / "checkpoints"),
        ("parity report", report / "index.html"),
        ("its figures", report / "report.json"),
    ):
        print(f"  {what:14} {path}")


def _free_folder(base: Path) -> Path:
    numbered = (base.with_name(f"{base.name}-{n}") for n in itertools.count(2))
    return next(path for path in itertools.chain([base], numbered) if not path.exists())


def _step(what: str, *command: str) -> None:
    print(f"\n== {what}: python {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        raise RunError(f"demo: «{what}» ended with exit code {code}; its message is above")


if __name__ == "__main__":
    run(main)
