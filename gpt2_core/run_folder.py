"""A run on disk: its configuration, metrics and checkpoints, and the rules for starting and resuming one."""

import dataclasses
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2_core.config import NEWEST, TrainConfig, differences, from_yaml, to_yaml
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically
from gpt2_core.weights import Weights

# What may differ between a run and its continuation: where and how it computes, what it shows and keeps, how long it
# is. Everything else decides the numbers.
_DECIDES_THE_NUMBERS = {"model", "data", "optimizer", "batch_size", "accumulation", "precision", "seed"}
_FREE_ON_RESUME = frozenset(f.name for f in dataclasses.fields(TrainConfig)) - _DECIDES_THE_NUMBERS


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and what can be read off them without a framework."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending. Both trainers rename a folder to its bare number last of all."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(p.name) for p in self.checkpoints.iterdir() if p.is_dir() and p.name.isdigit())

    def best_step(self) -> int | None:
        """The checkpoint whose evaluation has the lowest loss; the newest of all where nothing was evaluated."""
        steps = self.steps()
        evaluated = {r["step"]: r["loss"] for r in read_metrics(self.metrics) if r["split"] == "val"}
        candidates = [step for step in steps if step in evaluated]
        return min(candidates, key=evaluated.__getitem__) if candidates else (steps[-1] if steps else None)

    def checkpoint(self, choice: str) -> Path:
        """The checkpoint folder that `--checkpoint latest|best|STEP` names."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.path}: this run has no checkpoint yet")
        if choice == "latest":
            step = steps[-1]
        elif choice == "best":
            step = self.best_step()
        elif choice.isdigit() and int(choice) in steps:
            step = int(choice)
        else:
            raise UserError(
                f"--checkpoint {choice}: {self.path} has the steps {', '.join(map(str, steps))}; "
                "use latest, best or one of them"
            )
        return self.checkpoints / str(step)

    def write_sample(self, step: int, text: str) -> None:
        self.samples.mkdir(exist_ok=True)
        write_atomically(self.samples / f"{step}.txt", text + "\n")

    def obsolete_steps(self, keep: int) -> list[int]:
        """Checkpoints that are neither among the newest `keep` nor the best."""
        return [step for step in self.steps()[:-keep] if step != self.best_step()]

    def remove_obsolete(self, keep: int) -> None:
        for step in self.obsolete_steps(keep):
            # Renamed first: what is left of a killed removal must not look like a checkpoint.
            doomed = self.checkpoints / f".{step}.removed"
            (self.checkpoints / str(step)).rename(doomed)
            shutil.rmtree(doomed)


def open_run(config: TrainConfig, *, framework: str, data_digest: str) -> tuple[RunFolder, Path | None]:
    """The folder of a new or resumed run, and the checkpoint it starts from (None: from its initial weights).

    Writes config.yaml, and on resuming cuts metrics.jsonl back to the checkpoint. Raises UserError if the folder
    holds something that this run would overwrite, or if the run to resume is another one.
    """
    folder = RunFolder(Path(config.run_dir))
    checkpoint = _checkpoint_to_resume(config, folder)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, framework, data_digest)
    going_on = config.resume is not None and folder.config.is_file()
    if not going_on and folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
        raise UserError(_taken(folder, config))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.config, to_yaml(dataclasses.replace(config, resume=None)))
        if going_on:
            step = int(checkpoint.name) if checkpoint else 0
            _cut_metrics(folder.metrics, step, evaluated=checkpoint is not None)
    except OSError as error:
        raise UserError(f"--run_dir {folder.path}: can't write there ({error.strerror})") from error
    return folder, checkpoint


def _checkpoint_to_resume(config: TrainConfig, folder: RunFolder) -> Path | None:
    if config.resume is None:
        return None
    if config.resume == NEWEST:
        if not folder.config.is_file():
            raise UserError(f"--resume: {folder.path} holds no run to go on with; leave --resume out to start one")
        source, step = folder, (folder.steps() or [None])[-1]
    else:
        path = Path(config.resume)
        in_run = path.name.isdigit() and (path.parent.parent / "config.yaml").is_file()
        source = RunFolder(path.parent.parent if in_run else path)
        if not source.config.is_file():
            raise UserError(f"--resume {path}: neither a run folder nor a checkpoint of one (RUN/checkpoints/STEP)")
        step = int(path.name) if in_run else (source.steps() or [None])[-1]
        if step is None or step not in source.steps():
            raise UserError(f"--resume {path}: there is no checkpoint; {_listed(source)}")
        same_run = folder.path.exists() and source.path.resolve() == folder.path.resolve()
        if same_run and step != source.steps()[-1]:
            raise UserError(
                f"--resume {path}: {folder.path} has gone on to step {source.steps()[-1]}, which going on from "
                f"{step} would overwrite; name a new --run_dir"
            )
        if not same_run and folder.config.is_file():
            raise UserError(_taken(folder, config))
    changed = list(differences(config, from_yaml(source.config), _FREE_ON_RESUME))
    if changed:
        name, now, before = changed[0]
        more = f" (and {len(changed) - 1} more settings)" if len(changed) > 1 else ""
        raise UserError(
            f"--resume: {source.path} was trained with {name} {before}, not {now}{more}; "
            "give the same settings, or leave --resume out and name a new --run_dir"
        )
    return None if step is None else source.checkpoints / str(step)


def _listed(folder: RunFolder) -> str:
    steps = folder.steps()
    return f"{folder.path} has the steps {', '.join(map(str, steps))}" if steps else f"{folder.path} has none"


def _taken(folder: RunFolder, config: TrainConfig) -> str:
    if not folder.config.is_file():
        return f"--run_dir {folder.path}: exists and is not a run; name a folder that is new or empty"
    changed = [name for name, _, _ in differences(config, from_yaml(folder.config), _FREE_ON_RESUME)]
    if changed:
        return (
            f"--run_dir {folder.path}: already holds a run of another configuration "
            f"({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''} differ); name a new --run_dir"
        )
    return f"--run_dir {folder.path}: already holds this run; go on with it by --resume, or name a new --run_dir"


def _check_checkpoint(checkpoint: Path, framework: str, data_digest: str) -> None:
    metadata = read_metadata(checkpoint)
    if metadata["framework"] != framework:
        raise UserError(
            f"--resume: {checkpoint} was written by the {metadata['framework']} trainer; resume it there, or start "
            f"from its weights with --init_from {checkpoint}"
        )
    if metadata["data_digest"] != data_digest:
        raise UserError(
            f"--resume: the text has changed since {checkpoint} was written, so the batches would not be the run's "
            "own; put the text back, or start from the weights with --init_from"
        )


def metadata_of(config: TrainConfig, step: int, framework: str, data_digest: str) -> dict[str, Any]:
    """What a checkpoint says about itself, beside its arrays."""
    return {
        "framework": framework,
        "step": step,
        "data_digest": data_digest,
        "tokenizer": config.data.tokenizer,
        "model": dataclasses.asdict(config.model),
    }


def metadata_of_weights(weights: Weights, framework: str) -> dict[str, Any]:
    """The same for a checkpoint that holds weights and no training state."""
    return {
        "framework": framework,
        "step": 0,
        "data_digest": None,
        "tokenizer": weights.tokenizer,
        "model": dataclasses.asdict(weights.config),
    }


def metadata_path(checkpoint: Path) -> Path:
    """Where a checkpoint keeps its metadata: Orbax's own place for an item called «metadata», which both sides use."""
    return checkpoint / "metadata" / "metadata"


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads(metadata_path(checkpoint).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: not a checkpoint of this project ({error})") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a killed run left half-written is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _cut_metrics(path: Path, step: int, *, evaluated: bool) -> None:
    """Keep what happened before the checkpoint of `step`; the evaluation of that very step precedes its checkpoint."""
    last = {"train": step - 1, "val": step if evaluated else step - 1}
    _write_rows(path, (row for row in read_metrics(path) if row["step"] <= last[row["split"]]))


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
