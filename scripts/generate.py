"""Generate text from a trained model: python scripts/generate.py --weights RUN --prompt TEXT"""

from gpt2_commands.generate import main
from gpt2_core.cli import run

if __name__ == "__main__":
    run(lambda arguments: main(arguments, "generate.py"))
