"""Measuring several sides in alternating rounds: each is a child process with a warm model, which works on request."""

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from gpt2_core.cli import run
from gpt2_core.errors import RunError, UserError
from gpt2_core.files import write_atomically
from gpt2_core.memory import keep_freed_memory

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "numpy")
_ROOT = Path(__file__).parent.parent


@dataclasses.dataclass
class Session:
    """What a child process has set up: facts about it, its work, and facts that are known only at the end."""

    facts: dict[str, Any]
    work: Callable[[int], Any]
    """Does that many units of work, and returns when it is done; this call is timed."""
    end: Callable[[], dict[str, Any]] = dict


class Side:
    """A child process that holds a `Session`; `name` is for messages."""

    def __init__(self, name: str, function: str, spec: dict[str, Any]) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.measure", function, json.dumps(spec), str(time.time())]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        pipe = subprocess.PIPE
        # A file, not a pipe: nobody reads while the side works, and a compiler may print more than a pipe holds.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (`kill` closes it)
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        self.facts: dict[str, Any] = self._read()
        self._pause()

    def work(self, units: int) -> float:
        """Seconds that so many units took."""
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{units}\n")
        self._process.stdin.flush()
        seconds = self._read()["seconds"]
        self._pause()
        return seconds

    def end(self) -> dict[str, Any]:
        """End the process, and return the facts known at its end."""
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        found = self._read()
        self._process.wait()
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _pause(self) -> None:
        """Stop the process while another is measured: its idle threads would still use the CPU, looking for work."""
        self._process.send_signal(signal.SIGSTOP)

    def _read(self) -> dict[str, Any]:
        # Libraries print too; messages to this process are marked.
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        code = self._process.wait()
        self._errors.seek(0)
        raise (UserError if code == 2 else RunError)(f"{self.name}: {last_words(self._errors.read(), code)}")


def last_words(text: str, code: int) -> str:
    """Why a process ended with this code, from what it printed: its own error, an exception, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # JAX prints more after an exception, and XLA ends a process with a fatal line and a stack.
    for pattern in (r"error: (.*)", r"((?:[\w.]+\.)?\w*(?:Error|Exception)\b.*)", r"F\d{4} \S+ +\d+ \S+\] (.*)"):
        found = [match[1] for line in lines if (match := re.match(pattern, line))]
        if found:
            return found[-1]
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}"
    return lines[-1] if lines else "it printed nothing"


_MARK = "\x1fbench "


def serve(function: str, spec: dict[str, Any], started: float) -> None:
    """The child process: set up the session, then work as the parent asks until it closes the pipe."""
    keep_freed_memory()  # as the commands do; for the sides compared with them too
    module, _, name = function.partition(":")
    session: Session = getattr(importlib.import_module(module), name)(spec)
    session.work(1)
    _say(session.facts | {"seconds_to_first_unit": time.time() - started})
    for line in sys.stdin:
        begin = time.perf_counter()
        session.work(int(line))
        _say({"seconds": time.perf_counter() - begin})
    _say(session.end())


def _say(values: dict[str, Any]) -> None:
    print(_MARK + json.dumps(values), flush=True)


@contextlib.contextmanager
def sides(functions: dict[str, tuple[str, dict[str, Any]]], console: Console) -> Iterator[dict[str, Side]]:
    """Start every side, one after the other; all are killed at the end of the block."""
    started: dict[str, Side] = {}
    try:
        for name, (function, spec) in functions.items():
            with console.status(f"starting {name}"):
                started[name] = Side(name, function, spec)
        yield started
    finally:
        for side in started.values():
            side.kill()


def interleave(
    started: dict[str, Side], *, rounds: int, units: int | Mapping[str, int], console: Console
) -> dict[str, list[float]]:
    """Seconds a unit: for each side a list with a value for each round. Sides alternate (A B A B), so that a slow
    minute slows both.

    `units` are done in a round, by each side or by all.
    """
    [seconds] = interleave_works(started, rounds=rounds, works=[units], console=console)
    return seconds


def interleave_works(
    started: dict[str, Side], *, rounds: int, works: Sequence[int | Mapping[str, int]], console: Console
) -> list[dict[str, list[float]]]:
    """As `interleave`, for several pieces of work in a round, one result for each: times measured right after each
    other can be subtracted."""
    of_side = [{name: work if isinstance(work, int) else work[name] for name in started} for work in works]
    seconds: list[dict[str, list[float]]] = [{name: [] for name in started} for _ in works]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("rounds", total=rounds * len(started))
        for name, side in started.items():
            for units in of_side:
                side.work(units[name])  # warm
        for _ in range(rounds):
            for name, side in started.items():
                for units, found in zip(of_side, seconds, strict=True):
                    found[name].append(side.work(units[name]) / units[name])
                progress.advance(bar)
    return seconds


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast one side is as another: the median over rounds, and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Speed of `ours` over that of `theirs`, from seconds a unit that were measured in the same rounds."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def write_json(path: str | None, arguments: list[str], results: Any) -> None:
    """Write the results with their command, machine, versions and date."""
    if path is None:
        return
    try:
        write_atomically(Path(path), json.dumps(description(arguments) | {"results": results}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: can't be written ({error.strerror})") from error


def description(arguments: list[str]) -> dict[str, Any]:
    """Command, date, machine, versions, and the commit if git knows it."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(["python", "scripts/bench.py", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    with contextlib.suppress(OSError):
        asked = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
        )
        return asked.stdout.strip() or None
    return None


def positive(options: Any, *names: str) -> None:
    """Raise UserError unless the options of these names are 1 or more."""
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be 1 or more")


if __name__ == "__main__":
    run(lambda arguments: serve(arguments[0], json.loads(arguments[1]), float(arguments[2])))
