"""Compare the JAX and the PyTorch model: python parity/compare.py --help

A file to run and not to import: as a module it would take the place of the function `parity.compare`.
"""

from gpt2_core.cli import run
from parity.gpt2.command import main

if __name__ == "__main__":
    run(main)
