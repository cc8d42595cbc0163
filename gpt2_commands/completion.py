"""gpt2 completion: what makes a shell complete the commands, by jsonargparse and shtab."""

import importlib
import importlib.util
from typing import Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from gpt2_core.cli import Parser
from gpt2_core.errors import UserError


def main(arguments: list[str], command: str = "gpt2 completion") -> None:
    options = parser(command).parse(arguments)
    if importlib.util.find_spec("shtab") is None:
        raise UserError(f"{command}: needs the package shtab; pip install 'gpt2-jax[completion]'")
    set_parsing_settings(add_print_completion_argument=True)
    _all_commands().parse_args([f"--print_completion=shtab-{options.shell}"])  # prints and exits


def parser(command: str) -> Parser:
    made = Parser(
        prog=command,
        description='Print what makes a shell complete the commands and their options: eval "$(gpt2 completion bash)", '
        "or a file among those that your shell reads.",
    )
    made.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="The shell.")
    return made


def _all_commands() -> ArgumentParser:
    """One parser of all commands; only completion needs it, and it imports what all of them do."""
    from gpt2_commands.__main__ import COMMANDS

    made = ArgumentParser(prog="gpt2")
    subcommands = made.add_subcommands()
    for name, command in COMMANDS.items():
        of_command = importlib.import_module(command.module).parser(f"gpt2 {name}")
        subcommands.add_subcommand(name, of_command, help=command.what)
    return made
