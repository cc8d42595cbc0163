"""Turn a corpus into token shards on disk: python scripts/prepare_data.py --help"""

from gpt2_commands.prepare import main
from gpt2_core.cli import run

if __name__ == "__main__":
    run(lambda arguments: main(arguments, "prepare_data.py"))
