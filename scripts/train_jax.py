"""Train GPT-2 with JAX on a mesh of devices: python scripts/train_jax.py --help"""

from gpt2_core.runs.stop import starting


def main(arguments: list[str]) -> None:
    from gpt2_core.cli import parse_train_config
    from gpt2_core.memory import keep_freed_memory
    from gpt2_jax.launch import Launch, check_devices, find_place
    from gpt2_jax.mesh import check_option

    keep_freed_memory()
    config, launch = parse_train_config(
        arguments,
        command="train_jax.py",
        framework="JAX",
        elsewhere={
            "device": "it chooses train_torch.py's device; here: --mesh, and JAX_PLATFORMS=cpu for the CPU",
            "compile": "train_jax.py always compiles; it belongs to train_torch.py",
            "fsdp": "it splits train_torch.py's model over processes; here: --mesh fsdp=8",
        },
        check=check_option,
        launch=Launch,
    )
    place = find_place(launch)
    if place is not None:
        check_devices(config.mesh, place.processes)

    from gpt2_jax.distributed import joined
    from gpt2_jax.runtime import configure

    with joined(place) as processes:
        configure(config.precision, config.mesh, processes.count, deterministic=config.deterministic)

        from gpt2_convert import read_initial_weights
        from gpt2_jax.train import train

        train(config, read_initial_weights, processes)


if __name__ == "__main__":
    with starting():
        from gpt2_core.cli import run

        run(main)
