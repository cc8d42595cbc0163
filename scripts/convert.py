"""Convert weights, bit for bit: python scripts/convert.py SRC DST --to FORMAT"""

from gpt2_commands.convert import main
from gpt2_core.cli import run

if __name__ == "__main__":
    run(lambda arguments: main(arguments, "convert.py"))
