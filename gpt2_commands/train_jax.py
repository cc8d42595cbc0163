"""gpt2 train: train GPT-2 with JAX on a mesh of devices."""

from gpt2_core.cli import Parser


def main(arguments: list[str], command: str = "gpt2 train") -> None:
    from gpt2_convert import describe, read_initial_weights
    from gpt2_core.cli import parse_train_config
    from gpt2_core.memory import keep_freed_memory
    from gpt2_jax.launch import Launch, check_devices, find_place
    from gpt2_jax.mesh import check_option

    keep_freed_memory()
    config, launch = parse_train_config(
        arguments,
        command=command,
        framework="JAX",
        elsewhere={
            "device": "it chooses the PyTorch trainer's device; here: --mesh, and JAX_PLATFORMS=cpu for the CPU",
            "compile": "the JAX trainer always compiles; it belongs to gpt2 train-torch",
            "fsdp": "it splits the PyTorch trainer's model over processes; here: --mesh fsdp=8",
        },
        check=check_option,
        launch=Launch,
        describe_weights=describe,
    )
    place = find_place(launch)
    if place is not None:
        check_devices(config.mesh, place.processes)

    from gpt2_jax.distributed import joined
    from gpt2_jax.runtime import configure

    with joined(place) as processes:
        configure(config.precision, config.mesh, processes.count, deterministic=config.deterministic)

        from gpt2_jax.train import train

        train(config, read_initial_weights, processes)


def parser(command: str) -> Parser:
    from gpt2_core.cli import train_parser
    from gpt2_jax.launch import Launch

    return train_parser(command, "JAX", Launch)
