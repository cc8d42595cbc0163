"""gpt2 recipes: the recipes that come with this project."""

from gpt2_core.cli import Parser
from gpt2_core.config import recipes
from gpt2_core.errors import UserError


def main(arguments: list[str], command: str = "gpt2 recipes") -> None:
    options = parser(command).parse(arguments)
    if options.action is None:
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"{name:<{width}}  {recipes.about(name)}")
        print(f"\n{command} show NAME prints one; gpt2 train --config NAME trains it")
    elif options.action != "show" or options.name is None:
        raise UserError(f"{command} {options.action}: expected {command}, or {command} show NAME")
    else:
        print(recipes.text(options.name), end="")


def parser(command: str) -> Parser:
    made = Parser(prog=command, description="List the recipes by name, or show one.")
    made.add_argument("action", type=str, nargs="?", help="show, to print a recipe. Left out: a list of all.")
    made.add_argument("name", type=str, nargs="?", help="The recipe to print.")
    return made
