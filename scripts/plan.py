"""What training on a mesh of GPUs takes, without a GPU: python scripts/plan.py --help"""

import sys
from pathlib import Path

# The package benchmarks, which compiles for --compiled, isn't installed.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from gpt2_core.cli import run


def main(arguments: list[str]) -> None:
    from benchmarks.compiled import compile_program
    from gpt2_commands.plan import main

    main(arguments, "plan.py", compile_program)


if __name__ == "__main__":
    run(main)
