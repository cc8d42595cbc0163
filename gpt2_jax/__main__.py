"""python -m gpt2_jax COMMAND: the same as `gpt2 COMMAND`, where the folder of commands isn't on the path."""

# The one import of this package that goes upwards, and an exception in the import contracts: this file is run and never
# imported, so nothing depends on it.
from gpt2_commands.__main__ import run

if __name__ == "__main__":
    run()
