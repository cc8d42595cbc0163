"""Measure speed: python scripts/bench.py train|generate|data|checkpoint|scaling|start|compiled|campaign --help"""

import importlib
import sys
from pathlib import Path

# The package benchmarks isn't installed: it measures a clone, and this is the one.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from benchmarks.requirements import ESSENTIAL, require_or_exit
from gpt2_core.errors import UserError

# Each is a module of the package benchmarks.
COMMANDS = {
    "train": "a train step of both frameworks, side by side",
    "generate": "prefill and decoding, with and without KV cache, against the reference and transformers",
    "data": "speed of tokenisation, beside tiktoken's own, and of batches",
    "checkpoint": "how much a save slows the steps around it, and how long a restore takes",
    "scaling": "step time by size of the model, batch and number of devices",
    "start": "time from the command to the first step, beside importing the libraries",
    "compiled": "a GPU's train step, compiled without a GPU: kernels, bytes, collectives, lower bounds of its time",
    "campaign": "all measurements that need a GPU, within a budget of minutes; called again, it continues",
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
    require_or_exit(ESSENTIAL, "bench.py")
    from gpt2_core.cli import run

    run(main)
