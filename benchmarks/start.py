"""bench.py start: time from the command to the first step of the quickstart, beside importing its libraries."""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.measure import positive, ratio, write_json
from gpt2_core.cli import Parser
from gpt2_core.errors import RunError

_ROOT = Path(__file__).parent.parent
IMPORTS = "import jax, flax, optax, orbax.checkpoint, grain"


def main(arguments: list[str]) -> None:
    parser = Parser(prog="bench.py start", description=__doc__.partition(": ")[2])
    parser.add_argument("--rounds", type=int, default=5, help="Rounds, in each of which both are measured.")
    parser.add_argument("--json", type=str, help="File to write the results to, with command, machine and versions.")
    options = parser.parse(arguments)
    positive(options, "rounds")
    console = Console(markup=False, soft_wrap=True, highlight=False)
    imports, starts = [], []
    with tempfile.TemporaryDirectory() as folder, console.status("cold") as status:
        # The first start fills the cache of compiled programs and the folder of tokens.
        cold = _first_step(Path(folder), "cold")
        for number in range(options.rounds):
            status.update(f"round {number + 1} of {options.rounds}")
            imports.append(_imports(Path(folder)))
            starts.append(_first_step(Path(folder), str(number)))
    relative = ratio(imports, starts)
    console.print(f"{IMPORTS}: {statistics.median(imports):.2f} s")
    console.print(f"quickstart to its first step, nothing compiled or tokenised before: {cold:.2f} s")
    console.print(
        f"the same, compiled and tokenised before: {statistics.median(starts):.2f} s, {relative} times the imports"
    )
    results = {"imports": imports, "first_step": starts, "cold": cold, "ratio": dataclasses.asdict(relative)}
    write_json(options.json, ["start", *arguments], results)


def _imports(folder: Path) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, env=_environment(folder), capture_output=True)
    return time.perf_counter() - begin


def _first_step(folder: Path, name: str) -> float:
    """Seconds from the command until the first step's loss is printed; the run is then killed."""
    options = ["--run_dir", str(folder / name), "--data.cache_dir", str(folder / "tokens"), "--log_interval", "1"]
    command = [sys.executable, "-u", str(_ROOT / "scripts" / "train_jax.py"), *options]
    begin = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=_environment(folder)) as run:
        said = []
        for line in run.stdout:
            said.append(line)
            if _is_first_step(line.split()):
                took = time.perf_counter() - begin
                run.kill()
                return took
    raise RunError(f"train_jax.py ended before its first step: {said[-1].strip() if said else 'it printed nothing'}")


def _is_first_step(words: Sequence[str]) -> bool:
    return list(words[:3]) == ["step", "0", "loss"]


def _environment(folder: Path) -> dict[str, str]:
    """The environment with another compilation cache than the user's."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"XDG_CACHE_HOME": str(folder / "cache")}
