"""gpt2 COMMAND: everything that this project does with a GPT-2, by one name. `python -m gpt2_jax` is the same."""

import contextlib
import importlib
import sys
from typing import NamedTuple

from gpt2_core.runs.stop import starting


class Command(NamedTuple):
    """A command: its module has `main(arguments, command)` and `parser(command)`, `command` being what was typed."""

    module: str
    what: str
    is_run: bool = False
    """Whether it begins a run, which a signal may stop from the first moment on."""


COMMANDS = {
    "train": Command("gpt2_commands.train_jax", "train with JAX, on a mesh of devices", is_run=True),
    "train-torch": Command("gpt2_commands.train_torch", "train with PyTorch, the same recipes", is_run=True),
    "generate": Command("gpt2_commands.generate", "continue a text, with weights in any format"),
    "page": Command("gpt2_commands.page", "a page on which both frameworks continue a prompt side by side"),
    "evaluate": Command("gpt2_commands.evaluate", "published tasks, and the loss of any tokens"),
    "convert": Command("gpt2_commands.convert", "weights from one format into another, bit for bit"),
    "prepare": Command("gpt2_commands.prepare", "a corpus into token files"),
    "recipes": Command("gpt2_commands.recipes", "list the recipes that --config takes by name, or show one"),
    "plan": Command("gpt2_commands.plan", "what training takes on GPUs, without one"),
    "parity": Command("parity.gpt2.command", "prove that the JAX and the PyTorch model are the same"),
    "completion": Command("gpt2_commands.completion", "print what makes a shell complete these commands"),
}


def main(arguments: list[str]) -> None:
    from gpt2_core.errors import UserError

    if arguments in (["-h"], ["--help"]):
        print(_usage())
        return
    if not arguments or arguments[0] not in COMMANDS:
        given = f"{arguments[0]}: no such command" if arguments else "no command given"
        raise UserError(f"{given}; use {', '.join(COMMANDS)}, or --help")
    name, *rest = arguments
    importlib.import_module(COMMANDS[name].module).main(rest, f"gpt2 {name}")


def _usage() -> str:
    lines = [f"  {name:<12} {command.what}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gpt2 COMMAND [options]",
            "",
            *lines,
            "",
            "gpt2 COMMAND --help lists its options. Any two models, not only these, are compared by `parity compare`.",
        ]
    )


def run() -> None:
    """The console command `gpt2`."""
    command = COMMANDS.get(next(iter(sys.argv[1:]), ""))
    with starting() if command and command.is_run else contextlib.nullcontext():
        from gpt2_core.cli import run

        run(main)


if __name__ == "__main__":
    run()
