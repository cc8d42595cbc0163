"""Checkpoints by Orbax: written while training goes on, restored onto any mesh."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gpt2_core.config import ModelConfig
from gpt2_core.errors import UserError
from gpt2_core.run_folder import RunFolder, read_metadata
from gpt2_core.weights import Weights
from gpt2_jax.train_step import TrainState
from gpt2_jax.weights import to_canonical


class CheckpointWriter:
    """Saves states of one run in the background, and removes the checkpoints that are no longer kept.

    A checkpoint's folder gets its name, the bare step, when it is whole; what a killed save leaves behind has another
    name, and is swept away here.
    """

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self._folder, self._keep = folder, keep
        folder.checkpoints.mkdir(exist_ok=True)
        for leftover in folder.checkpoints.iterdir():
            if not leftover.name.isdigit():
                shutil.rmtree(leftover)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> None:
        """Start saving; returns once the state is copied and may be donated. Waits for the save before, if need be."""
        self._checkpointer.wait_until_finished()
        self._folder.remove_obsolete(self._keep)
        self._checkpointer.save(
            (self._folder.checkpoints / str(step)).absolute(),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_tree(state)), metadata=ocp.args.JsonSave(metadata)
            ),
        )

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._checkpointer.wait_until_finished()
        self._folder.remove_obsolete(self._keep)
        self._checkpointer.close()


def restore(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, laid out as `abstract` says; bitwise what was saved, on any mesh."""
    target = _tree(abstract)
    _check_stored(checkpoint, target)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore((checkpoint / "state").absolute(), target)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint}: can't be restored ({_first_line(error)})") from error
    return TrainState(**tree)


def read_weights(checkpoint: Path) -> Weights:
    """The canonical weights of a checkpoint, on the host."""
    metadata = read_metadata(checkpoint)
    path = (checkpoint / "state").absolute()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree["params"]
            names = {name: np.dtype(array.dtype) for name, array in stored.items()}
            tree = checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item={"params": dict.fromkeys(names, 0)},
                    restore_args={"params": {n: ocp.RestoreArgs(restore_type=np.ndarray) for n in names}},
                    partial_restore=True,
                ),
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint}: can't be read ({_first_line(error)})") from error
    return to_canonical(tree["params"], ModelConfig(**metadata["model"]), str(checkpoint), metadata["tokenizer"])


def _tree(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def _check_stored(checkpoint: Path, target: dict[str, Any]) -> None:
    """Orbax casts without a word to the dtype it is asked for, so what is stored is compared first."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata((checkpoint / "state").absolute()).item_metadata.tree["params"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint}: can't be read ({_first_line(error)})") from error
    for name, wanted in target["params"].items():
        found = stored.get(name)
        if found is None or tuple(found.shape) != wanted.shape or np.dtype(found.dtype) != wanted.dtype:
            there = f"{found.dtype} {tuple(found.shape)}" if found is not None else "missing"
            raise UserError(f"{checkpoint}: {name} is {there}; this run needs {wanted.dtype} {wanted.shape}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def host_copy(params: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Parameters gathered from their devices."""
    return {name: np.asarray(value) for name, value in params.items()}
