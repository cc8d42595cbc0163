"""Train GPT-2 with PyTorch: python scripts/train_torch.py --help"""

from gpt2_core.runs.stop import starting


def main(arguments: list[str]) -> None:
    from gpt2_commands.train_torch import main

    main(arguments, "train_torch.py")


if __name__ == "__main__":
    with starting():
        from gpt2_core.cli import run

        run(main)
