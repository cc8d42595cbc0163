"""Checkpoints by Orbax: written while training goes on, restored onto any mesh."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from gpt2_core.config import model_from_dict
from gpt2_core.errors import UserError
from gpt2_core.run_folder import RunFolder, metadata_of_weights, read_metadata
from gpt2_core.weights import Stored, StoredArrays, Weights
from gpt2_core.weights.layouts import JAX
from gpt2_jax.train_step import TrainState


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
    """A checkpoint of `weights` alone, to start from and not to resume; returns its folder.

    The parameters are in memory once. Orbax would copy every numpy array before it writes the first; it takes JAX
    arrays as they are and copies at most `save_concurrent_gb` of them at a time, which must exceed the largest.
    """
    stored = JAX.encode(weights.stored, weights.config)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):  # or float64 would become float32
        params = {name: jax.device_put(tensor.read()) for name, tensor in stored.items()}
    largest = max(tensor.nbytes for tensor in stored.values())
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1.1 * largest / 1e9 + 0.01)
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(state=handler, metadata=ocp.JsonCheckpointHandler())
    ) as writer:
        writer.save(
            checkpoint.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({"params": params}),
                metadata=ocp.args.JsonSave(metadata_of_weights(weights, "jax")),
            ),
        )
    return checkpoint


def read_weights(checkpoint: Path) -> Weights:
    """The canonical weights of a checkpoint, read as they are asked for, in the dtype that is stored."""
    metadata = read_metadata(checkpoint)
    with _reader(checkpoint) as reader:
        found = {
            name: Stored(tuple(there.shape), np.dtype(there.dtype), functools.partial(_read, checkpoint, name))
            for name, there in _stored_parameters(reader, checkpoint).items()
        }
    config = model_from_dict(metadata["model"], str(checkpoint))
    arrays = JAX.decode(found, config, str(checkpoint))
    return Weights(config, StoredArrays(arrays), str(checkpoint), metadata["tokenizer"])


def _read(checkpoint: Path, name: str) -> np.ndarray:
    as_numpy = {"params": {name: ocp.RestoreArgs(restore_type=np.ndarray)}}
    with _reader(checkpoint) as reader:
        restored = reader.restore(
            checkpoint.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(item={"params": {name: 0}}, restore_args=as_numpy, partial_restore=True)
            ),
        )
    return restored.state["params"][name]


@contextlib.contextmanager
def _reader(checkpoint: Path) -> Iterator[ocp.Checkpointer]:
    """An Orbax reader; whatever it finds wrong becomes one sentence."""
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler())
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # Orbax logs what it then raises too
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unless_closed_loop, hook)
    try:
        with ocp.Checkpointer(handler) as reader:
            yield reader
        sys.unraisablehook = hook
    except UserError:
        raise
    except Exception as error:
        # A damaged checkpoint ends in any kind of error, and in reads still under way that find the event loop closed
        # which waited for them: the hook stays, to keep them quiet.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{checkpoint}: can't be restored ({reason:.300})") from error
    finally:
        logging.set_verbosity(verbosity)


def _unless_closed_loop(hook: Callable[[Any], None], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


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
