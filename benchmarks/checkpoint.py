"""bench.py checkpoint: how much a save slows the steps around it, and how long a restore takes, in both trainers."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import JaxTraining, TorchTraining, add_json, add_options, configuration
from benchmarks.measure import Session, positive, sides, write_json
from gpt2_core.cli import Parser, with_sizes
from gpt2_core.config import PRESETS
from gpt2_core.config.io import from_dict
from gpt2_core.runs.folder import RunFolder, metadata_of

SIDES = {"jax": "benchmarks.checkpoint:jax_session", "torch": "benchmarks.checkpoint:torch_session"}


def main(arguments: list[str]) -> None:
    options = _parser().parse(with_sizes(arguments, PRESETS["gpt2"]))
    positive(options, "batch", "rounds", "steps", "interval")
    config = configuration(options)
    spec = {"config": dataclasses.asdict(config), "rounds": options.rounds, "steps": options.steps}
    console = Console(markup=False, soft_wrap=True, highlight=False)
    found: dict[str, dict[str, Any]] = {}
    for name, function in SIDES.items():
        with sides({name: (function, spec)}, console) as started:
            found[name] = _row(started[name].facts, options.interval)
    table = Table("", *found)
    for label, key, form in (
        ("a step", "step_seconds", "{:.3f} s"),
        ("a checkpoint", "bytes", "{:,} bytes"),
        ("save() returns after", "blocked_seconds", "{:.3f} s"),
        (f"the {options.steps} steps after a save take longer by", "slower_seconds", "{:.3f} s"),
        ("written to disk, without steps meanwhile, in", "written_seconds", "{:.3f} s"),
        (f"time lost to a save every {options.interval} steps", "share_lost", "{:.2%}"),
        ("restored in (from the page cache)", "restore_seconds", "{:.3f} s"),
    ):
        table.add_row(label, *(form.format(row[key]) for row in found.values()))
    console.print(f"{config.model.parameter_count:,} parameters; medians of {options.rounds} rounds")
    console.print(table)
    write_json(options.json, ["checkpoint", *arguments], {"config": dataclasses.asdict(config), "sides": found})


def jax_session(spec: dict[str, Any]) -> Session:
    training = JaxTraining(from_dict(spec["config"]))
    import jax

    from gpt2_jax.checkpoints import CheckpointWriter, restore

    config = training.config

    def read(checkpoint: Path) -> None:
        jax.block_until_ready(restore(checkpoint, training.program.abstract_state))

    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        writer = CheckpointWriter(folder, keep=1)

        def write(step: int) -> Callable[[], None]:
            writer.save(step, training.state, metadata_of(config, step, "jax", ""))
            return writer.wait

        facts = _measure(spec, training.work, write, read, folder)
        writer.close()
    return Session(facts, lambda steps: None)


def torch_session(spec: dict[str, Any]) -> Session:
    training = TorchTraining(from_dict(spec["config"]), compile=False)
    from gpt2_torch import checkpoints

    def read(checkpoint: Path) -> None:
        checkpoints.restore_model(checkpoint, training.model)
        checkpoints.restore_optimizer(checkpoint, training.optimizer)

    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))

        def write(step: int) -> Callable[[], None]:
            metadata = metadata_of(training.config, step, "torch", "")
            state, moments = training.model.state_dict(), training.optimizer.state_dict()
            checkpoints.save(folder.checkpoints / str(step), state, metadata, moments)
            folder.remove_obsolete(1)
            return lambda: None

        facts = _measure(spec, training.work, write, read, folder)
    return Session(facts, lambda steps: None)


def _measure(
    spec: dict[str, Any],
    work: Callable[[int], Any],
    write: Callable[[int], Callable[[], None]],
    read: Callable[[Path], None],
    folder: RunFolder,
) -> dict[str, Any]:
    """In each round: steps, a save with as many steps after it, a save alone, and its restore.

    `write` starts the save of a numbered checkpoint and returns a function that waits for its end.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", "blocked", "saving", "written", "restore")}
    work(spec["steps"])
    write(0)()
    for number in range(1, 2 * spec["rounds"], 2):
        seconds["plain"].append(_timed(lambda: work(spec["steps"])))
        begin = time.perf_counter()
        wait = write(number)
        seconds["blocked"].append(time.perf_counter() - begin)
        seconds["saving"].append(_timed(lambda: work(spec["steps"])))
        wait()
        checkpoint = folder.checkpoints / str(number + 1)
        seconds["written"].append(_timed(lambda number=number: write(number + 1)()))
        seconds["restore"].append(_timed(lambda path=checkpoint: read(path)))
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return {"seconds": seconds, "steps": spec["steps"], "bytes": size}


def _row(facts: dict[str, Any], interval: int) -> dict[str, Any]:
    seconds = facts["seconds"]
    step = statistics.median(seconds["plain"]) / facts["steps"]
    blocked = statistics.median(seconds["blocked"])
    slower = statistics.median(b - a for a, b in zip(seconds["plain"], seconds["saving"], strict=True))
    return {
        "step_seconds": step,
        "bytes": facts["bytes"],
        "blocked_seconds": blocked,
        "slower_seconds": slower,
        "written_seconds": statistics.median(seconds["written"]),
        "share_lost": (blocked + slower) / (interval * step),
        "restore_seconds": statistics.median(seconds["restore"]),
        "seconds": seconds,
    }


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _parser() -> Parser:
    parser = Parser(prog="bench.py checkpoint", description=__doc__.partition(": ")[2])
    add_options(parser, preset="gpt2", batch=2)
    add_json(parser)
    parser.add_argument("--rounds", type=int, default=3, help="Saves of each trainer.")
    parser.add_argument("--steps", type=int, default=5, help="Steps after each save, while it is being written.")
    parser.add_argument(
        "--interval", type=int, default=250, help="Steps between two saves, for the share of time that saves take."
    )
    return parser
