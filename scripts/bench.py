"""Measure speed: python scripts/bench.py train|generate|data|checkpoint|scaling|start|compiled --help"""

import importlib

from gpt2_core.cli import run
from gpt2_core.errors import UserError

# Each is a module of the package benchmarks.
COMMANDS = {
    "train": "a train step of both frameworks, side by side",
    "generate": "prefill and decoding, with and without KV cache, against the reference and transformers",
    "data": "tokenisation against tiktoken's own, and batches",
    "checkpoint": "what a save costs the steps around it, and how long a restore takes",
    "scaling": "how a step grows with the model, the batch and the number of devices",
    "start": "from the command to the first step, beside a bare import of the libraries",
    "compiled": "the program that a GPU would run, without a GPU: kernels, bytes, exchanges, the least time of a step",
}


def main(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: bench.py COMMAND [options]\n")
        for name, what in COMMANDS.items():
            print(f"  {name:<12} {what}")
        return
    if not arguments or arguments[0] not in COMMANDS:
        given = f"{arguments[0]}: no such command" if arguments else "no command given"
        raise UserError(f"{given}; use {', '.join(COMMANDS)}")
    importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    run(main)
