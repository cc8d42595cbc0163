"""What training on a mesh of GPUs takes, without a GPU: python scripts/plan.py --help"""

from gpt2_core.cli import run


def main(arguments: list[str]) -> None:
    from benchmarks.plan import main

    main(arguments)


if __name__ == "__main__":
    run(main)
