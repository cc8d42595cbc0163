"""Trackers for a run's metrics: Weights & Biases, TensorBoard or MLflow, each an optional package."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, Protocol

from gpt2_core.config import TrainConfig
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically
from gpt2_core.parsing import read_json

_PROJECT = "gpt2-jax"
_MODULES = {"wandb": "wandb", "tensorboard": "tensorboard.summary", "mlflow": "mlflow"}


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None:
        """Values of a step by name, like train/loss."""

    def close(self) -> None: ...


def require(name: str | None) -> None:
    """Raises UserError if the tracker's package isn't installed."""
    if name is None:
        return
    try:
        importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise UserError(
            f"--track {name}: not installed ({error}); pip install 'gpt2-jax[{name}]', or leave --track out"
        ) from error


def open_tracker(folder: Path, config: TrainConfig) -> Tracker | None:
    """The tracker that `config.track` names, or None. A resumed run continues the tracker's own run.

    Raises UserError if it can't be started.
    """
    if config.track is None:
        return None
    require(config.track)
    try:
        return {"wandb": _Wandb, "tensorboard": _TensorBoard, "mlflow": _Mlflow}[config.track](folder, config)
    except Exception as error:  # each package has its own errors
        hint = "; run `wandb login`, or set WANDB_MODE=offline" if config.track == "wandb" else ""
        raise UserError(
            f"--track {config.track}: it can't be started ({' '.join(str(error).split())}){hint}"
        ) from error


class _Wandb:
    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        self._run = wandb.init(
            project=_PROJECT,
            name=folder.name,
            id=_saved_id(folder, "wandb"),
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True),
        )
        _save_id(folder, "wandb", self._run.id)
        # A resumed run starts at its checkpoint, but wandb's own step can only grow.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path, config: TrainConfig) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Mlflow:
    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import mlflow

        self._mlflow = mlflow
        before = _saved_id(folder, "mlflow")
        if before is None:
            mlflow.set_experiment(_PROJECT)
        run = mlflow.start_run(run_id=before, run_name=None if before else folder.name)
        if before is None:
            mlflow.log_params(_flat(dataclasses.asdict(config)))
        _save_id(folder, "mlflow", run.info.run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _saved_id(folder: Path, name: str) -> str | None:
    file = folder / "tracker.json"
    return read_json(file).get(name) if file.is_file() else None


def _save_id(folder: Path, name: str, identity: str) -> None:
    file = folder / "tracker.json"
    known = read_json(file) if file.is_file() else {}
    write_atomically(file, json.dumps(known | {name: identity}) + "\n")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": v for key, v in _flat(value).items()} if isinstance(value, dict) else {name: value}
    return flat
