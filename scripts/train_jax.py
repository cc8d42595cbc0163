"""Train GPT-2 with JAX on a mesh of devices: python scripts/train_jax.py --help"""

from gpt2_core.runs.stop import starting


def main(arguments: list[str]) -> None:
    from gpt2_commands.train_jax import main

    main(arguments, "train_jax.py")


if __name__ == "__main__":
    with starting():
        from gpt2_core.cli import run

        run(main)
