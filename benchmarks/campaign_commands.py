"""Stages of a campaign that run other programs: the driver's, and this project's own commands."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2_core.files import write_atomically

_ROOT = Path(__file__).parent.parent

# Bytes of the text that configs/shakespeare_overfit.yaml overfits.
_TEXT_BYTES = 1_115_394


def environment(spec: dict[str, Any]) -> dict[str, Any]:
    """The device as its driver describes it, and the rates that each framework reaches on it."""
    from rich.console import Console

    from benchmarks.measure import sides

    rates = {}
    for framework in ("jax", "torch"):
        with sides({framework: (f"benchmarks.rates:{framework}_session", spec)}, Console(markup=False)) as started:
            rates[framework] = started[framework].facts
    return {"rates": rates, "gpu": nvidia_smi()}


def nvidia_smi() -> dict[str, str] | None:
    """Facts and clocks of the first GPU; None without the driver's tool."""
    fields = ["name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit",
              "temperature.gpu"]  # fmt: skip
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], capture_output=True, text=True
    )
    lines = asked.stdout.strip().splitlines()
    if asked.returncode or not lines:
        return None
    return dict(zip(fields, (value.strip() for value in lines[0].split(",")), strict=False))


def generation(spec: dict[str, Any]) -> dict[str, Any]:
    """bench.py generate: prefill and decoding of JAX, beside transformers where that is installed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "generate.json"
        # Both sides hold the GPU's memory at once.
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        _run("scripts/bench.py", "generate", *spec["arguments"], "--json", str(result), environment=shared)
        return json.loads(result.read_text(encoding="utf-8"))["results"]


def parity(spec: dict[str, Any]) -> dict[str, Any]:
    """parity/compare.py: its verdict and how long it took; the report stays in the folder."""
    folder = Path(spec["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    # Exit code 1: a check failed, which is a result.
    _run("parity/compare.py", *spec["arguments"], "--report", str(folder), good=(0, 1))
    seconds = time.perf_counter() - begin
    if not (folder / "report.json").is_file():
        sys.exit(1)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    failed = [check for check in report["checks"] if not check["passed"]]
    return {"passed": report["passed"], "cases": len(report["checks"]), "failed": failed, "seconds": seconds,
            "skipped": report["skipped"]}  # fmt: skip


def overfit(spec: dict[str, Any]) -> dict[str, Any]:
    """Run configs/shakespeare_overfit.yaml to its target: its losses beside the published ones, and the seconds."""
    folder = Path(spec["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if spec["text"]:
        text, what = Path(spec["text"]), Path(spec["text"]).name
    else:
        text, what = folder / "text.txt", "the reference manual and docstrings of Python's standard library"
        write_atomically(text, bundled_text())
    run = folder / "run"
    begin = time.perf_counter()
    _run(
        "scripts/train_jax.py",
        *("--config", str(_ROOT / "configs" / "shakespeare_overfit.yaml"), "--mesh", "1", "--log_interval", "1"),
        *("--data.corpus", "text", "--data.path", str(text), "--data.cache_dir", str(folder / "tokens")),
        *("--run_dir", str(run), "--target_loss", str(spec["target_loss"]), *spec["arguments"]),
    )
    seconds = time.perf_counter() - begin
    shutil.rmtree(run / "checkpoints")  # gigabytes, and the run isn't resumed
    return _curve(run) | {"seconds": seconds, "text": what, "bytes": text.stat().st_size, "target": spec["target_loss"]}


def bundled_text() -> bytes:
    """As many bytes of English as the recipe's own text, from every Python's reference manual and docstrings."""
    from pydoc_data.topics import topics

    text = "\n\n".join([*topics.values(), *_docstrings()])
    return text.encode("utf-8")[:_TEXT_BYTES].decode("utf-8", "ignore").encode("utf-8")


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"}.isdisjoint(path.parts):
            source = path.read_text(encoding="utf-8", errors="ignore")
            yield from (inspect.cleandoc(found) for found in re.findall(r'^ *"""(.*?)"""', source, re.M | re.S))


def _curve(run: Path) -> dict[str, Any]:
    from gpt2_core.config.io import from_yaml
    from gpt2_core.runs.folder import reference_of

    config = from_yaml(run / "config.yaml")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    rates = sorted(row["tokens_per_second"] for row in rows if row["split"] == "train")
    reference = reference_of(config)
    return {
        "losses": losses,
        "published": reference.losses if reference else {},
        "steps": max(losses) + 1,
        "tokens_per_second": rates[len(rates) // 2],
    }


def _run(script: str, *arguments: str, environment: dict[str, str] | None = None, good: tuple[int, ...] = (0,)) -> None:
    """Run a command of this project; if it fails, exit with its code: its last line is then the stage's message."""
    command = [sys.executable, str(_ROOT / script), *arguments]
    code = subprocess.run(command, env=os.environ | (environment or {})).returncode
    if code not in good:
        sys.exit(code if code > 0 else 1)
