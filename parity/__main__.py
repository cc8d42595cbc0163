"""Any two models: parity compare A B --inputs I, parity capture A --inputs I --out FILE; python -m parity is the same.

Exit codes: 0 the two are the same, 1 they differ or it can't be told, 2 it can't be done as asked.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from parity.engine.errors import EngineError

USAGE = "parity compare REFERENCE CANDIDATE | capture MODEL; --help after either says more"
# A sentence, and no command of this file, which knows no GPT-2.
GPT2 = "The suite that proves this project's own GPT-2, with its weights or yours, is `gpt2 parity`."


def main(arguments: list[str]) -> None:
    commands = {"compare": _compare, "capture": _capture}
    if not arguments or arguments[0] not in commands:
        if arguments in (["--help"], ["-h"]):
            print(f"{USAGE}\n{GPT2}")
            return
        raise EngineError(f"{arguments[0] if arguments else 'no command'}: expected {USAGE}")
    commands[arguments[0]](arguments[1:])


def _compare(arguments: list[str]) -> None:
    options = _compare_parser().parse_args(arguments)
    reference, candidate = _model(options.reference), _model(options.candidate)
    if options.inputs is None and not options.reference.endswith(".safetensors"):
        raise EngineError("--inputs: is needed; module:function, or a file in .safetensors, .npz or .npy")
    inputs = _inputs(options.inputs) if options.inputs else reference.inputs()
    from parity.pair.compare import compare

    console = Console(markup=False, soft_wrap=True, highlight=False)
    with console.status("") as status:
        found = compare(
            reference,
            candidate,
            inputs=inputs,
            to_candidate=_attribute("--to_candidate", options.to_candidate),
            checks=options.checks.split(","),
            mapping=options.mapping,
            ignore=options.ignore.split(",") if options.ignore else (),
            loss=_attribute("--loss", options.loss),
            optimizer=_attribute("--optimizer", options.optimizer),
            steps=options.steps,
            mode=options.mode,
            weights=options.weights,
            seed=options.seed,
            mutants=options.mutants,
            progress=lambda what: status.update(what),
        )
    found.write(options.report)
    from parity.engine.report import table

    (Console(markup=False) if console.is_terminal else Console(markup=False, width=150)).print(table(found.results))
    if found.passed:
        console.print(f"the two are the same model; report in {Path(options.report) / 'index.html'}", style="green")
    else:
        console.print(found.in_words(), style="bold red")
    if found.mutation_score:
        score = found.mutation_score
        console.print(
            f"mutation score {score.score:.2f}: {score.noticed} of {score.effective} changes would be noticed"
        )
        for sentence in score.in_words():
            console.print(f"  {sentence}")
    if not found.passed:
        console.print(f"report in {Path(options.report) / 'index.html'}")
        sys.exit(1)


def _capture(arguments: list[str]) -> None:
    options = _capture_parser().parse_args(arguments)
    from parity.pair.capturing import capture

    path = capture(
        _model(options.model),
        inputs=_inputs(options.inputs),
        out=options.out,
        mode=options.mode,
        overwrite=options.overwrite,
    )
    print(f"captured to {path}")


class _Parser(argparse.ArgumentParser):
    """With errors as one sentence and no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            known = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(unknown[1], known, 1)
            message = f"{unknown[1]}: not expected here" + (f"; did you mean {close[0]}?" if close else "")
        raise EngineError(f"{message.removeprefix('argument ')}; see --help")


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text}") from error


def _compare_parser() -> _Parser:
    parser = _Parser(
        prog="parity compare",
        description=f"Whether two models, of PyTorch or JAX, compute the same. {GPT2}",
    )
    models = (
        "module:name of a model, or of a function without arguments that makes one (importable from here), or a file "
        "that `parity capture` wrote."
    )
    parser.add_argument("reference", help=f"The model to trust: {models}")
    parser.add_argument("candidate", help="The model to judge, likewise.")
    parser.add_argument("--inputs", help="module:name of inputs or of a function that makes them, or a file "
                        "in .safetensors, .npz or .npy. Left out: those of a captured reference.")  # fmt: skip
    parser.add_argument("--to_candidate", help="module:function from the reference's inputs to the candidate's.")
    parser.add_argument(
        "--checks",
        default="weights,forward,gradients",
        help="Among weights, forward, gradients, state, optimizer, loss_curve; comma between.",
    )
    parser.add_argument("--mapping", help="A mapping of weights, as the report's mapping.yaml.")
    parser.add_argument("--ignore", help="Names of weights without a counterpart, comma between.")
    parser.add_argument("--loss", help="module:name of a loss, a function of (outputs, *inputs), or of a pair.")
    parser.add_argument("--optimizer", help="module:name of the pair (function of parameters that returns a "
                        "torch.optim optimizer, optax transformation).")  # fmt: skip
    parser.add_argument("--steps", type=_whole_number, default=20, help="Length of the loss curve, in steps.")
    parser.add_argument("--mode", default="eval", help="eval, or train (dropout off).")
    parser.add_argument(
        "--weights",
        default="random",
        help="random: random ones in which every tensor matters; own: each model's own.",
    )
    parser.add_argument("--seed", type=_whole_number, default=0, help="Of the random weights and changes.")
    parser.add_argument("--mutants", type=_whole_number, default=0, help="How many changes of the candidate to try.")
    parser.add_argument("--report", default="parity_report", help="Folder for index.html and report.json.")
    return parser


def _capture_parser() -> _Parser:
    parser = _Parser(prog="parity capture", description="Write what a model computes, to compare elsewhere.")
    parser.add_argument("model", help="module:name of a model, or of a function that makes one.")
    parser.add_argument("--inputs", required=True, help="module:name, or a file in .safetensors, .npz or .npy.")
    parser.add_argument("--out", required=True, help="The file to write, in .safetensors.")
    parser.add_argument("--mode", default="eval", help="eval, or train (dropout off).")
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing file.")
    return parser


def _model(name: str) -> Any:
    if name.endswith(".safetensors"):
        from parity.pair.capturing import Captured

        return Captured(name)
    return _attribute("model", name)


def _attribute(option: str, name: str | None) -> Any:
    """What module:name is; modules are looked for in the current folder first."""
    if name is None:
        return None
    module, colon, attribute = name.partition(":")
    if not colon:
        raise EngineError(f"{option} {name}: expected module:name")
    with _from_here():
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise EngineError(f"{option} {name}: {error}; expected module:name, importable from here") from error


def _inputs(name: str) -> Any:
    path = Path(name)
    if path.suffix in (".safetensors", ".npz", ".npy"):
        try:
            return _from_file(path)
        except (OSError, ValueError) as error:
            raise EngineError(f"--inputs {name}: can't be read ({error})") from error
    return _attribute("--inputs", name)


def _from_file(path: Path) -> Any:
    """One array; several in the order of their names if those are numbers; otherwise keyword arguments."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    else:
        from safetensors.numpy import load_file

        arrays = load_file(path)
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    if all(n.isdigit() for n in arrays):
        return tuple(arrays[n] for n in sorted(arrays, key=int))
    return arrays


@contextlib.contextmanager
def _from_here() -> Iterator[None]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def run() -> None:
    """The command line's command; an error that the user caused is one sentence, without a traceback."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the pipe (head, less) has exited.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    run()
