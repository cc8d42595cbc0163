"""gpt2 train-torch: train GPT-2 with PyTorch."""

from gpt2_core.cli import Parser, parse_train_config, train_parser


def main(arguments: list[str], command: str = "gpt2 train-torch") -> None:
    from gpt2_convert import describe, read_initial_weights
    from gpt2_core.memory import keep_freed_memory

    keep_freed_memory()
    only_in_jax = "it chooses how the JAX trainer spreads its work; here: --device, or torchrun for several GPUs"
    config = parse_train_config(
        arguments,
        command=command,
        framework="Torch",
        elsewhere=dict.fromkeys(
            ("mesh", "attention", "norm_kernel", "scan_layers", "remat", "gradient_exchange"), only_in_jax
        ),
        describe_weights=describe,
    )
    from gpt2_torch.train import train

    train(config, read_initial_weights)


def parser(command: str) -> Parser:
    return train_parser(command, "Torch")
