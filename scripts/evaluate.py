"""Evaluate a trained model: python scripts/evaluate.py --weights RUN --tasks hellaswag,lambada,wikitext103"""

from gpt2_commands.evaluate import main
from gpt2_core.cli import run

if __name__ == "__main__":
    run(lambda arguments: main(arguments, "evaluate.py"))
