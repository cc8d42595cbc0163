"""Running a stage in its own process group, which is killed when its time is over; a failure becomes a message."""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import last_words
from gpt2_core.cli import run

_ROOT = Path(__file__).parent.parent

Status = Literal["done", "failed", "skipped", "out of time"]


class Skip(Exception):
    """Raised by a stage that can't be done here; its message says why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a stage ended: its `results` if it is done, else the reason in `message`."""

    status: Status
    seconds: float
    results: Any = None
    message: str = ""


def run_stage(function: str, spec: dict[str, Any], *, limit: float, log: Path) -> Outcome:
    """Call `module:function` with `spec` in a process that may take `limit` seconds; what it prints goes to `log`.

    The function returns what JSON can hold. All processes that it started are killed at its end, and if this process
    is interrupted.
    """
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        result = Path(folder) / "result.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.runner", function, json.dumps(spec), str(result)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return Outcome("out of time", time.monotonic() - begin, message=f"killed after {limit:.0f} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - begin
        if code == 0:
            return Outcome(seconds=seconds, **json.loads(result.read_text(encoding="utf-8")))
    said = log.read_text(encoding="utf-8", errors="replace")
    return Outcome("failed", seconds, message=last_words(said, code))


def _serve(function: str, spec: dict[str, Any], result: Path) -> None:
    module, _, name = function.partition(":")
    try:
        outcome = {"status": "done", "results": getattr(importlib.import_module(module), name)(spec)}
    except Skip as reason:
        outcome = {"status": "skipped", "message": str(reason)}
    result.write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    # Stages raise the `Skip` of benchmarks.runner, which is another class than __main__'s.
    from benchmarks import runner

    run(lambda arguments: runner._serve(arguments[0], json.loads(arguments[1]), Path(arguments[2])))
