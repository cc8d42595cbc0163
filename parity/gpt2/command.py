"""The command that compares the JAX and the PyTorch model: gpt2 parity, or python parity/compare.py.

Exit codes: 0 every check passed, 1 one failed, 2 it can't be done as asked.
"""

import functools
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gpt2_core.cli import Parser
from gpt2_core.errors import UserError
from parity.engine.errors import EngineError
from parity.gpt2.suite import CANNOT_SEE, CHECKS, RESTS_ON


def main(arguments: list[str], command: str = "python parity/compare.py") -> None:
    try:
        _compare(arguments, command)
    except EngineError as error:
        raise UserError(str(error)) from error


def _compare(arguments: list[str], command: str) -> None:
    options = parser(command).parse(arguments)
    chosen = _chosen(options.checks)
    if options.steps is not None and options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be 1 or more")
    if options.quick and options.full:
        raise UserError("--quick and --full: give one of the two")
    if options.prove and (options.weights or options.against or options.full or options.steps):
        raise UserError(
            "--prove: plants its mistakes in a tiny model of its own; give it without other weights and lengths"
        )
    from parity.engine import processes, report

    folder = Path(options.report)
    report.open_folder(folder)

    from gpt2_convert import read_weights
    from parity.gpt2.adapters.protocol import NAMES
    from parity.gpt2.cases import SMALL, SMALL_QUICK, Case, random_weights, real_text

    small = SMALL_QUICK if options.quick else SMALL
    weights = read_weights(options.weights, options.checkpoint) if options.weights else random_weights(small)
    level = "quick" if options.quick else "full" if options.full else "default"
    case = Case(weights, real_text(weights), level, options.steps)
    console = Console(markup=False, soft_wrap=True, highlight=False)
    console.print(f"{weights.source}: {weights.config.parameter_count:,} parameters")

    if options.prove:
        from parity.gpt2.faults import case_of

        case = case_of()
    typed = shlex.join([*command.split(), *arguments])
    found = report.Report(NAMES, case.weights.source, typed, RESTS_ON, CANNOT_SEE)
    tasks = _tasks(chosen, options)
    parameters = case.weights.config.parameter_count
    several = processes.count(parameters, len(tasks), options.device)
    if several == 1:
        _use(options.device)
    answers, evidence = {}, {}
    with _progress(console) as progress:
        bar = progress.add_task("", total=len(tasks), name="")
        for done in processes.run(tasks, case, parameters, several, functools.partial(_use, options.device)):
            answers[done.name], evidence[done.name] = done.answer, done.evidence
            progress.update(bar, advance=1, name=done.name)
            if not console.is_terminal:
                console.print(f"{done.name}: {done.seconds:.1f} s")
    for name in tasks:
        found.add(answers[name])
        found.evidence.update(evidence[name])
    report.write(folder, found)
    wide = Console(markup=False) if console.is_terminal else Console(markup=False, width=150)
    wide.print(report.table(found.results))
    for skipped in found.skipped:
        console.print(f"skipped {skipped.check}: {skipped.reason}")
    style = "green" if found.passed else "bold red"
    if found.explanation:
        console.print(found.explanation, style=style)
    console.print(f"{found.verdict}; report in {folder / 'index.html'}", style=style)
    if not found.passed:
        sys.exit(1)


def _use(device: str) -> None:
    """Put both frameworks on the CPU, where JAX makes eight virtual devices for the meshes, or on the GPUs."""
    # JAX would otherwise take most of a GPU's memory before PyTorch has any.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import torch

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    from gpt2_jax.runtime import configure, has_accelerator

    configure("float64", 8)
    if device == "gpu":
        for framework, there in (("JAX", has_accelerator()), ("PyTorch", torch.cuda.is_available())):
            if not there:
                raise UserError(f"--device gpu: {framework} finds no GPU here; use --device cpu")


def _tasks(chosen: list[str], options) -> dict[str, Callable]:
    """What there is to do, by a name for the display: functions of the case, in the order of the report."""
    device = "cuda" if options.device == "gpu" else "cpu"
    if options.against:
        return {options.against: functools.partial(_against, options.against, device)}
    # Several processes begin at the end: a check takes longer than a planted mistake.
    tasks: dict[str, Callable] = {}
    if options.prove:
        from parity.gpt2.faults import FAULTS

        tasks |= {fault.name: functools.partial(_judge, fault, device) for fault in FAULTS}
    tasks |= {name: functools.partial(_check, name, device) for name in chosen}
    if options.full:
        tasks["gpt2 in float64"] = functools.partial(_full_size, device)
    return tasks


def _check(name: str, device: str, case) -> list:
    from parity.gpt2.adapters import both
    from parity.gpt2.suite import load

    return list(load(name)(case, *both(case.weights, device)))


def _against(other: str, device: str, case) -> list:
    from gpt2_convert import read_weights
    from parity.engine import results
    from parity.gpt2 import external
    from parity.gpt2.adapters import both
    from parity.gpt2.suite import PACKAGES

    candidate, reference = both(case.weights, device)
    module, colon, _ = other.partition(":")
    if colon and not Path(other).exists():
        run = functools.partial(external.implementation, case, reference, other)
    else:
        run = functools.partial(external.weights, case, candidate, read_weights(other))
    # What the user typed is theirs: lines of the module are named too, and a UserError is no failed case.
    packages = (*PACKAGES, module.partition(".")[0])
    return list(results.guarded("against", run, packages=packages, passes=UserError)())


def _judge(fault, device: str, _):
    from parity.gpt2.faults import judge

    return judge(fault, device)


def _full_size(device: str, _) -> list:
    from parity.gpt2.suite import guarded

    return list(guarded("forward", _at_full_size)(device))


def _at_full_size(device: str) -> Iterator:
    """GPT-2 at 124M parameters, forward and gradients."""
    from gpt2_core.config import PRESETS, ModelConfig
    from parity.engine.results import Result
    from parity.gpt2.adapters import both
    from parity.gpt2.cases import Case, random_weights, real_text
    from parity.gpt2.suite import load

    weights = random_weights(ModelConfig(**PRESETS["gpt2"], block_size=128))
    case = Case(weights, real_text(weights, 2_000), "quick")
    for name in ("forward", "gradients"):
        for r in load(name)(case, *both(weights, device)):
            yield Result(r.check, f"gpt2, 124M: {r.case}", r.measured, r.limit, r.where)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.completed} of {task.total}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[name]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def parser(command: str) -> Parser:
    made = Parser(
        prog=command,
        description="Prove that the JAX and the PyTorch model are the same, on a small random model or on weights of "
        f"yours. The checks are {', '.join(CHECKS)}; docs/parity.md says what each compares.",
    )
    made.add_argument(
        "--weights",
        type=str,
        help="Weights to compare on: a path in any format that gpt2 convert reads, or a name of the Hugging Face Hub "
        "(gpt2). Left out: a small random model.",
    )
    made.add_argument(
        "--checkpoint", type=str, default="latest", help="Which checkpoint of a run folder: latest, best or a step."
    )
    made.add_argument(
        "--against",
        type=str,
        help="Compare --weights with other weights (a path), or with your own implementation (module:name of a model "
        "of either framework, of a function that makes one, or of a function from token ids to logits) that holds "
        "them, instead of the checks.",
    )
    made.add_argument(
        "--device",
        type=Literal["cpu", "gpu"],
        default="cpu",
        help="Where both frameworks compute; gpu adds the kernels that training uses there, in `precision`.",
    )
    made.add_argument("--report", type=str, default="parity_report", help="Folder for report.json and index.html.")
    made.add_argument("--checks", type=str, help="Names of checks to run, comma between. Left out: all.")
    made.add_argument(
        "--steps", type=int, help="Length of the loss curve, in steps. Left out: 200; quick 40, full 1000."
    )
    made.add_argument(
        "--quick", action="store_true", help="One real case of every check: about 40 seconds on two cores."
    )
    made.add_argument(
        "--full", action="store_true", help="GPT-2 at 124M parameters and a loss curve of 1,000 steps besides."
    )
    made.add_argument(
        "--prove",
        action="store_true",
        help="Plant every mistake of parity/gpt2/faults in a tiny model and see each caught; without, it must pass.",
    )
    return made


def _chosen(names: str | None) -> list[str]:
    if names is None:
        return list(CHECKS)
    for name in names.split(","):
        if name not in CHECKS:
            raise UserError(f"--checks {names}: no check is called {name!r}; there are {', '.join(CHECKS)}")
    return names.split(",")
