"""Train GPT-2 with PyTorch: python scripts/train_torch.py --help"""

from gpt2_core.runs.stop import starting


def main(arguments: list[str]) -> None:
    from gpt2_core.cli import parse_train_config
    from gpt2_core.memory import keep_freed_memory

    keep_freed_memory()
    only_in_jax = "it chooses how train_jax.py spreads its work; here: --device, or torchrun for several GPUs"
    config = parse_train_config(
        arguments,
        command="train_torch.py",
        framework="Torch",
        elsewhere=dict.fromkeys(
            ("mesh", "attention", "norm_kernel", "scan_layers", "remat", "gradient_exchange"), only_in_jax
        ),
    )
    from gpt2_convert import read_initial_weights
    from gpt2_torch.train import train

    train(config, read_initial_weights)


if __name__ == "__main__":
    with starting():
        from gpt2_core.cli import run

        run(main)
