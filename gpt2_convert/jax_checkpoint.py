"""The format `jax`: checkpoints of the JAX trainer, which Orbax writes."""

from pathlib import Path

from gpt2_convert.format import Format, Holds
from gpt2_convert.source import Source
from gpt2_core.config.io import model_from_dict
from gpt2_core.weights import LazyArrays, Weights
from gpt2_core.weights.layouts import JAX


def detect(source: Source) -> bool:
    metadata = source.checkpoint_metadata
    return metadata is not None and metadata["framework"] == "jax"


def read(source: Source) -> Weights:
    metadata = source.checkpoint_of("jax")
    from gpt2_jax.checkpoints import open_parameters  # here, so that PyTorch's trainer starts without JAX

    config = model_from_dict(metadata["model"], str(source.folder))
    arrays = JAX.decode(open_parameters(source.folder), config, str(source.folder))
    return Weights(config, LazyArrays(arrays), str(source.folder), metadata["tokenizer"])


def write(weights: Weights, path: Path) -> None:
    from gpt2_jax.checkpoints import write_weights

    write_weights(weights, path)


FORMAT = Format(
    layout=JAX,
    holds=~Holds(0),
    described="a run folder or checkpoint of this project",
    help="a checkpoint of the JAX trainer (Orbax)",
    detect=detect,
    read=read,
    write=write,
    owns=lambda name: name in ("_CHECKPOINT_METADATA", "commit_success.txt", "metadata", "state"),
)
