"""Checkpoints by Orbax: written in the background during training, restored onto any mesh."""

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from gpt2_core.errors import SaveError, UserError, reason
from gpt2_core.files import publish
from gpt2_core.parsing import json_object
from gpt2_core.runs.folder import RunFolder, losses_of, metadata_of_weights
from gpt2_core.runs.manifest import write_manifest
from gpt2_core.spikes import window
from gpt2_core.weights import LazyTensor, Weights
from gpt2_core.weights.layouts import JAX
from gpt2_jax.distributed import ALONE, Processes
from gpt2_jax.train_step import TrainState

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs, with a traceback, what it raises too


class CheckpointWriter:
    """Saves states of one run in the background, and removes the checkpoints that are no longer kept.

    A checkpoint's folder gets its name, the number of the step, when it is complete and on disk; what a killed save
    leaves behind has another name, and is removed when the run is resumed.
    """

    def __init__(self, folder: RunFolder, keep: int, processes: Processes = ALONE) -> None:
        self._folder, self._keep, self._processes = folder, keep, processes
        # Orbax's own barrier would wait 20 minutes for a process that can't write.
        options = ocp.options.AsyncOptions(barrier_sync_fn=self._barrier)
        self._checkpointer = ocp.AsyncCheckpointer(_handler(use_compression=False), async_options=options)
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        self._saves = 0

    def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> None:
        """Start saving; returns once the state is copied and may be donated. Waits for the save before, if need be.

        Raises SaveError if either can't be saved, in all processes if one can't.
        """
        self.wait()
        self._saves += 1
        temporary = self._folder.checkpoints / f".{step}.tmp"
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(_tree(state)), metadata=ocp.args.JsonSave(metadata))
        with _save_errors(step):
            self._together("prepare", lambda: self._processes.is_first and self._prepare(temporary))
            self._together("start", lambda: self._checkpointer.save(temporary.absolute(), args=args))
            self._saving = self._thread.submit(self._complete, temporary, step)

    def _prepare(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        # Where a folder can't be made, Orbax would leave threads that wait for it for ever.
        self._folder.checkpoints.mkdir(exist_ok=True)
        temporary.mkdir()
        temporary.rmdir()

    def _complete(self, temporary: Path, step: int) -> None:
        with _save_errors(step):
            self._together("write", self._checkpointer.wait_until_finished)
            self._together("publish", lambda: self._processes.is_first and self._publish(temporary, step))

    def _publish(self, temporary: Path, step: int) -> None:
        write_manifest(temporary)
        checkpoint = self._folder.checkpoints / str(step)
        shutil.rmtree(checkpoint, ignore_errors=True)
        publish(temporary, checkpoint)
        self._folder.remove_obsolete(self._keep)

    def _together(self, stage: str, do: Callable[[], Any]) -> None:
        self._processes.together(f"save {self._saves} {stage}", do)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        self._processes.meet(f"save {self._saves} {key}", task=f"save {self._saves} write")

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed, as `wait` would say."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait until everything is on disk; raises SaveError if the last save failed."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Wait, and end the threads; raises SaveError if the last save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()


@contextlib.contextmanager
def _save_errors(step: int) -> Iterator[None]:
    """Turn any error of writing a checkpoint into a SaveError: Orbax and tensorstore raise several types."""
    try:
        yield
    except Exception as error:
        raise SaveError(f"checkpoint {step} can't be saved ({reason(error)})") from error


def restore(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, with the shardings of `abstract`; bitwise what was saved, on any mesh."""
    target = _tree(abstract)
    _check_stored(checkpoint, _stored_parameters(checkpoint), target["params"])
    with _read_errors(checkpoint), ocp.Checkpointer(_handler()) as reader:
        restored = reader.restore(
            checkpoint.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
            ),
        )
    losses = None
    if (kind := abstract.losses) is not None:
        stored = np.asarray(window(losses_of(checkpoint)), kind.dtype)
        losses = jax.make_array_from_callback(stored.shape, kind.sharding, stored.__getitem__)
    return TrainState(**restored.state, losses=losses)


def write_weights(weights: Weights, checkpoint: Path) -> Path:
    """A checkpoint of `weights` alone, to start from and not to resume; returns its folder.

    The parameters are in memory once. Orbax would copy every numpy array before it writes the first; it takes JAX
    arrays as they are and copies at most `save_concurrent_gb` of them at a time, which must exceed the largest.
    Compression would hold a third copy of those, to make trained weights smaller by a tenth.
    """
    stored = JAX.encode(weights.tensors, weights.config)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):  # or float64 would become float32
        # One copied before the next is read, or the reading would run ahead.
        params = {name: jax.device_put(tensor.read()).block_until_ready() for name, tensor in stored.items()}
    largest = max(tensor.nbytes for tensor in stored.values())
    with ocp.Checkpointer(_handler(save_concurrent_gb=1.1 * largest / 1e9 + 0.01, use_compression=False)) as writer:
        writer.save(
            checkpoint.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({"params": params}),
                metadata=ocp.args.JsonSave(metadata_of_weights(weights, "jax")),
            ),
        )
    return checkpoint


def open_parameters(checkpoint: Path) -> dict[str, LazyTensor]:
    """The parameters of a checkpoint, in the dtype that is stored, each read when it is asked for."""
    return {
        name: LazyTensor(tuple(array.shape), array.dtype.numpy_dtype, functools.partial(_read, checkpoint, array))
        for name, array in _stored_parameters(checkpoint).items()
    }


def _stored_parameters(checkpoint: Path) -> dict[str, tensorstore.TensorStore]:
    """The parameters of a checkpoint, opened and not read yet.

    Opened with tensorstore, in which Orbax keeps them, and not by Orbax, whose metadata reader opens all at once: on a
    damaged checkpoint the first error closes its event loop under the others, and the process may crash.
    """
    state = checkpoint.absolute() / "state"
    context = tensorstore.Context()
    with _read_errors(checkpoint):
        described = json_object((state / "_METADATA").read_bytes(), f"{checkpoint}: its state/_METADATA")
        if not described["use_ocdbt"]:
            raise ValueError("its arrays lie in a folder each, as no version of this project wrote them")
        names = [[key["key"] for key in entry["key_metadata"]] for entry in described["tree_metadata"].values()]
        opened = {}
        for group, name, *_ in (keys for keys in names if len(keys) == 2):
            if group == "params":
                kvstore = {"driver": "ocdbt", "base": state.as_uri() + "/", "path": f"params.{name}/"}
                spec = {"driver": "zarr3" if described["use_zarr3"] else "zarr", "kvstore": kvstore}
                opened[name] = tensorstore.open(spec, open=True, read=True, context=context).result()
    return opened


def _read(checkpoint: Path, array: tensorstore.TensorStore) -> np.ndarray:
    with _read_errors(checkpoint):
        return array.read().result()


@contextlib.contextmanager
def _read_errors(checkpoint: Path) -> Iterator[None]:
    """Turn any error of reading a checkpoint into a UserError: a damaged one can raise any type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{checkpoint}: can't be restored ({reason(error)})") from error


def _handler(**options: Any) -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(**options), metadata=ocp.JsonCheckpointHandler()
    )


def _tree(state: TrainState) -> dict[str, Any]:
    # The losses are in the metadata: a run may be resumed with another --skip_spikes, and their number is small.
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def _check_stored(checkpoint: Path, stored: dict[str, tensorstore.TensorStore], wanted: dict[str, Any]) -> None:
    """Orbax casts silently to the dtype it is asked for, so the stored dtypes are compared first."""
    for name, array in wanted.items():
        found = stored.get(name)
        dtype = found and found.dtype.numpy_dtype
        if found is None or tuple(found.shape) != array.shape or dtype != array.dtype:
            there = f"{dtype} {tuple(found.shape)}" if found is not None else "missing"
            raise UserError(f"{checkpoint}: {name} is {there}; this run needs {array.dtype} {array.shape}")
