"""Checkpoints by Orbax: written while training goes on, restored onto any mesh."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.run_folder import RunFolder, metadata_of_weights, read_metadata
from gpt2_core.weights import Weights
from gpt2_jax.train_step import TrainState
from gpt2_jax.weights import from_canonical, to_canonical


class CheckpointWriter:
    """Saves states of one run in the background, and removes the checkpoints that are no longer kept.

    A checkpoint's folder gets its name, the bare step, when it is whole; what a killed save leaves behind has another
    name, and is swept away when the run goes on (gpt2_core.run_folder).
    """

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self._folder, self._keep = folder, keep
        folder.checkpoints.mkdir(exist_ok=True)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> None:
        """Start saving; returns once the state is copied and may be donated. Waits for the save before, if need be."""
        self._checkpointer.wait_until_finished()
        self._folder.remove_obsolete(self._keep)
        self._checkpointer.save(
            (self._folder.checkpoints / str(step)).absolute(),
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(_tree(state)), metadata=ocp.args.JsonSave(metadata)),
        )

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._checkpointer.wait_until_finished()
        self._folder.remove_obsolete(self._keep)
        self._checkpointer.close()


def restore(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, laid out as `abstract` says; bitwise what was saved, on any mesh."""
    target = _tree(abstract)
    with _reader(checkpoint) as reader:
        _check_stored(checkpoint, _stored_parameters(reader, checkpoint), target["params"])
        restored = reader.restore(
            checkpoint.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
            ),
        )
    return TrainState(**restored.state)


def write_weights(weights: Weights, checkpoint: Path) -> Path:
    """A checkpoint of `weights` alone, to start from and not to resume; returns its folder."""
    params = from_canonical(weights, weights.arrays["wte.weight"].dtype)
    metadata = metadata_of_weights(weights, "jax")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            checkpoint.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({"params": params}), metadata=ocp.args.JsonSave(metadata)
            ),
        )
    return checkpoint


def read_weights(checkpoint: Path) -> Weights:
    """The canonical weights of a checkpoint, on the host."""
    metadata = read_metadata(checkpoint)
    with _reader(checkpoint) as reader:
        names = list(_stored_parameters(reader, checkpoint))
        restored = reader.restore(
            checkpoint.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item={"params": dict.fromkeys(names, 0)},
                    restore_args={"params": {n: ocp.RestoreArgs(restore_type=np.ndarray) for n in names}},
                    partial_restore=True,
                )
            ),
        )
    config = ModelConfig(**metadata["model"])
    return to_canonical(restored.state["params"], config, str(checkpoint), metadata["tokenizer"])


@contextlib.contextmanager
def _reader(checkpoint: Path) -> Iterator[ocp.Checkpointer]:
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler())
    try:
        with ocp.Checkpointer(handler) as reader:
            yield reader
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint}: can't be restored ({str(error).strip().splitlines()[0]})") from error


def _tree(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def _stored_parameters(reader: ocp.Checkpointer, checkpoint: Path) -> dict[str, Any]:
    return reader.metadata(checkpoint.absolute()).item_metadata["state"].tree["params"]


def _check_stored(checkpoint: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Orbax casts without a word to the dtype it is asked for, so what is stored is compared first."""
    for name, array in wanted.items():
        found = stored.get(name)
        if found is None or tuple(found.shape) != array.shape or np.dtype(found.dtype) != array.dtype:
            there = f"{found.dtype} {tuple(found.shape)}" if found is not None else "missing"
            raise UserError(f"{checkpoint}: {name} is {there}; this run needs {array.dtype} {array.shape}")
