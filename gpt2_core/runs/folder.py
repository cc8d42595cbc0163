"""A run on disk: its configuration, metrics and checkpoints, and the rules for starting and resuming one."""

import dataclasses
import fcntl
import itertools
import json
import math
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_core.config import NEWEST, ResolvedConfig, TrainConfig
from gpt2_core.config.io import differences, from_yaml, to_yaml
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically, writing
from gpt2_core.parsing import json_object, read_text
from gpt2_core.runs.manifest import damage
from gpt2_core.spikes import WINDOW
from gpt2_core.weights import Weights

# Number of logged training losses whose mean ranks checkpoints and is compared with the target: one batch is noisy.
RECENT = 10

# What to do when the last checkpoint of a run couldn't be written.
SAVE_AGAIN = (
    "make room or set the permissions right, and continue with --resume from the newest checkpoint that is there"
)

# A resumed run may change where and how it computes, what it logs and keeps, and how long it is. These settings decide
# the numbers, and must stay.
_DECIDES_THE_NUMBERS = {
    "model",
    "data",
    "optimizer",
    "batch_size",
    "sequence_length",
    "accumulation",
    "precision",
    "gradient_exchange",
    "seed",
}
# The location of the text may change too: the digest of its tokens is compared. So may batch_tokens and
# device_batch_size, which have become batch_size and accumulation.
_FREE_ON_RESUME = frozenset(f.name for f in dataclasses.fields(TrainConfig)) - _DECIDES_THE_NUMBERS
_FREE_ON_RESUME |= {"data.path", "data.tokens", "data.cache_dir", "data.verify"}


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and what can be read from them without a framework."""

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
        """Steps of the complete checkpoints, ascending. Both trainers rename a folder to its number at the end."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(p.name) for p in self.checkpoints.iterdir() if p.is_dir() and _is_step(p.name))

    def best_step(self) -> int | None:
        """The checkpoint whose evaluation has the lowest loss; where nothing was evaluated, the one with the lowest
        training loss (`recent_training_loss`); the newest of all where nothing was logged either."""
        steps, rows = self.steps(), read_metrics(self.metrics)
        losses = {row["step"]: row["loss"] for row in rows if row["split"] == "val"}
        if not losses:
            losses = {step: recent_training_loss(rows, step) for step in steps}
        candidates = [step for step in steps if math.isfinite(losses.get(step, math.nan))]
        return min(candidates, key=losses.__getitem__) if candidates else (steps[-1] if steps else None)

    def checkpoint(self, choice: str) -> Path:
        """The checkpoint folder that `--checkpoint latest|best|STEP` names."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.path}: this run has no checkpoint yet")
        if choice == "latest":
            step = steps[-1]
        elif choice == "best":
            step = self.best_step()
        elif _is_step(choice) and int(choice) in steps:
            step = int(choice)
        else:
            raise UserError(
                f"--checkpoint {choice}: {self.path} has the steps {', '.join(map(str, steps))}; "
                "use latest, best or one of them"
            )
        return self.checkpoints / str(step)

    @property
    def diverged(self) -> Path:
        return self.path / "diverged"

    def write_diverged(
        self, step: int, sequences: list[int], module: str | None, *, inputs: np.ndarray, targets: np.ndarray
    ) -> None:
        """Keep what is needed to study a step whose loss or gradient isn't finite, or whose loss is a spike.

        That is its batch, the places of its sequences in the training data, and the first module whose output isn't
        finite; None: all outputs are, and the gradient isn't, or the loss was a spike.
        """
        self.diverged.mkdir(exist_ok=True)
        with writing(self.diverged / "batch.npz") as file:
            np.savez(file, inputs=inputs, targets=targets)
        found = {"step": step, "sequences": sequences, "first_module_not_finite": module}
        write_atomically(self.diverged / "step.json", json.dumps(found, indent=2) + "\n")

    def sample(self, step: int) -> Path:
        return self.samples / f"{step}.txt"

    def write_sample(self, step: int, text: str) -> None:
        self.samples.mkdir(exist_ok=True)
        write_atomically(self.sample(step), text + "\n")

    def obsolete_steps(self, keep: int) -> list[int]:
        """Checkpoints that are neither among the newest `keep` nor the best."""
        return [step for step in self.steps()[:-keep] if step != self.best_step()]

    def remove_obsolete(self, keep: int) -> None:
        """Remove the checkpoints that aren't kept, and write index.json, which names the latest and the best."""
        for step in self.obsolete_steps(keep):
            # Renamed first: a removal that is killed halfway must not leave something that looks like a checkpoint.
            doomed = self.checkpoints / f".{step}.removed"
            (self.checkpoints / str(step)).rename(doomed)
            doomed.unlink() if doomed.is_symlink() else shutil.rmtree(doomed)
        if steps := self.steps():
            # Not links, which tools that copy folders turn into copies of whole checkpoints.
            index = {"latest": str(steps[-1]), "best": str(self.best_step())}
            write_atomically(self.checkpoints / "index.json", json.dumps(index) + "\n")


@dataclasses.dataclass
class RunPlan:
    """A run that may begin: nothing has been written yet."""

    config: ResolvedConfig
    """As given; but a continued run keeps the `init_from` and `resume` that it began with."""
    folder: RunFolder
    checkpoint: Path | None
    """Where it starts from; None: from `config.init_from` or random weights."""
    continued: bool
    """Whether the folder already holds the run."""
    damaged: dict[int, str] = dataclasses.field(default_factory=dict)
    """Newer checkpoints of the run that can't be resumed from, and why: `begin` sets them aside."""

    @property
    def step(self) -> int:
        return int(self.checkpoint.name) if self.checkpoint else 0

    @property
    def warnings(self) -> list[str]:
        """What a person should know of how the run continues."""
        return [
            f"checkpoint {step} is damaged ({why}); it is set aside as {step}.damaged, and the run continues from step "
            f"{self.step}"
            for step, why in self.damaged.items()
        ]

    def begin(self) -> None:
        """Lock the folder, write config.yaml, set damaged checkpoints aside, remove leftovers of killed processes,
        truncate metrics.jsonl."""
        folder = self.folder
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            self._lock = (folder.path / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_atomically(folder.config, to_yaml(self.config))
            for step in self.damaged:
                (folder.checkpoints / str(step)).rename(_set_aside(folder, step))
            for leftover in (*folder.path.glob(".*.tmp"), *_killed_saves(folder.checkpoints)):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if self.continued:
                evaluated = self.checkpoint is not None and self.checkpoint.parent == folder.checkpoints
                _cut_metrics(folder.metrics, self.step, evaluated=evaluated)
        except BlockingIOError as error:
            raise UserError(
                f"--run_dir {folder.path}: another process is training there; wait for it or end it"
            ) from error
        except OSError as error:
            raise UserError(f"--run_dir {folder.path}: can't write there ({error.strerror})") from error


def plan_run(config: ResolvedConfig, *, framework: str, data_digest: str) -> RunPlan:
    """Where a new or resumed run lives and starts.

    Raises UserError if the folder holds something that this run would overwrite, or if the run to resume has other
    settings. A continued run that was killed before its first checkpoint starts again from what it first started from:
    random weights, given weights, or the checkpoint of another run.
    """
    folder = RunFolder(Path(config.run_dir))
    reference_of(config)  # one that isn't there ends the run here, and not when it is drawn
    checkpoint, damaged = None, {}
    if config.resume not in (None, NEWEST):
        checkpoint = _named_checkpoint(config.resume)
        if why := damage(checkpoint):
            raise UserError(
                f"--resume {config.resume}: {checkpoint} is damaged ({why}); name another checkpoint, or give --resume "
                "without a path and the run's own --run_dir: it then continues from the newest that is whole"
            )
        if folder.path.exists() and checkpoint.parent.resolve() == folder.checkpoints.resolve():
            if int(checkpoint.name) != folder.steps()[-1]:
                raise UserError(
                    f"--resume {config.resume}: {folder.path} is already at step {folder.steps()[-1]}, and continuing "
                    f"from {checkpoint.name} would overwrite it; name a new --run_dir"
                )
            config = dataclasses.replace(config, resume=NEWEST)
    continued = config.resume == NEWEST
    if continued:
        if not folder.config.is_file():
            raise UserError(f"--resume: {folder.path} holds no run to resume; leave --resume out to start one")
        _refuse_other_settings(config, folder)
        saved = from_yaml(folder.config)
        config = dataclasses.replace(config, init_from=saved.init_from, resume=saved.resume)
        if folder.steps():
            checkpoint, damaged = _newest_whole(folder)
        else:
            checkpoint = None if saved.resume is None else _named_checkpoint(saved.resume)
    else:
        if checkpoint is not None:
            _refuse_other_settings(config, RunFolder(checkpoint.parent.parent))
        _refuse_unless_free(folder, config)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, framework, data_digest)
        if int(checkpoint.name) > config.steps:
            raise UserError(
                f"--steps {config.steps}: the run is already at step {checkpoint.name}; use {checkpoint.name} or more"
            )
    return RunPlan(config, folder, checkpoint, continued, damaged)


def _newest_whole(folder: RunFolder) -> tuple[Path, dict[int, str]]:
    """The newest checkpoint of a run that is as it was written, and the damaged ones after it."""
    damaged: dict[int, str] = {}
    for step in reversed(folder.steps()):
        checkpoint = folder.checkpoints / str(step)
        if not (why := damage(checkpoint)):
            return checkpoint, damaged
        damaged[step] = why
    said = "; ".join(f"{step}: {why}" for step, why in damaged.items())
    raise UserError(
        f"--resume: every checkpoint of {folder.path} is damaged ({said}); start the run again in a new --run_dir"
    )


def _set_aside(folder: RunFolder, step: int) -> Path:
    """A free name for a damaged checkpoint, which isn't one of a checkpoint."""
    names = (f"{step}.damaged" + (f".{n}" if n else "") for n in itertools.count())
    return next(path for name in names if not (path := folder.checkpoints / name).exists())


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _named_checkpoint(name: str) -> Path:
    path = Path(name)
    in_run = _is_step(path.name) and (path.parent.parent / "config.yaml").is_file()
    source = RunFolder(path.parent.parent if in_run else path)
    if not source.config.is_file():
        raise UserError(f"--resume {path}: neither a run folder nor a checkpoint of one (RUN/checkpoints/STEP)")
    steps = source.steps()
    step = int(path.name) if in_run else (steps or [None])[-1]
    if step not in steps:
        raise UserError(f"--resume {path}: there is no checkpoint; {_listed(source)}")
    return source.checkpoints / str(step)


def _refuse_other_settings(config: TrainConfig, source: RunFolder) -> None:
    free = _FREE_ON_RESUME
    if config.device_batch_size is not None:
        free |= {"accumulation"}  # follows from the number of devices, which may change
    changed = list(differences(config, from_yaml(source.config), free))
    if changed:
        name, now, before = changed[0]
        more = f" (and {len(changed) - 1} more settings)" if len(changed) > 1 else ""
        raise UserError(
            f"--resume: {source.path} was trained with {name} {before}, not {now}{more}; "
            "give the same settings, or leave --resume out and name a new --run_dir"
        )


def _refuse_unless_free(folder: RunFolder, config: TrainConfig) -> None:
    if not folder.path.exists():
        return
    if folder.path.is_dir() and (_came_to_nothing(folder) or all(map(_is_ours, folder.path.iterdir()))):
        return
    raise UserError(_taken(folder, config))


def _came_to_nothing(folder: RunFolder) -> bool:
    """Whether a run ended before its first result, for example because it ran out of memory."""
    if not folder.metrics.is_file() or folder.metrics.stat().st_size or folder.steps():
        return False
    known = {folder.config.name, folder.metrics.name, folder.checkpoints.name}
    return all(path.name in known or _is_ours(path) for path in folder.path.iterdir())


def _is_ours(path: Path) -> bool:
    """Whether a process killed during its start may have left this in an otherwise empty folder."""
    return path.name == ".lock" or (path.name.startswith(".") and path.name.endswith(".tmp"))


def _killed_saves(checkpoints: Path) -> Iterator[Path]:
    """Leftovers of a save or a removal that was killed, by either trainer; nothing else in the folder."""
    for pattern in ("*.orbax-checkpoint-tmp*", ".*.tmp", ".*.removed"):
        yield from checkpoints.glob(pattern)


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
    return f"--run_dir {folder.path}: already holds this run; continue it with --resume, or name a new --run_dir"


def _check_checkpoint(checkpoint: Path, framework: str, data_digest: str) -> None:
    metadata = read_metadata(checkpoint)
    if metadata["step"] != int(checkpoint.name):
        raise UserError(
            f"--resume: {checkpoint} was written after {metadata['step']} steps, and its name says {checkpoint.name}; "
            "give it its own name again"
        )
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


def metadata_of(
    config: ResolvedConfig,
    step: int,
    framework: str,
    data_digest: str,
    figures: Mapping[str, float] | None = None,
    losses: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The metadata that a checkpoint holds in addition to its arrays.

    `figures` are the newest of the run (`RunLog.figures`), for people; `losses` those by which the next spike is seen.
    """
    spikes = {} if losses is None else {"losses": list(losses)}
    return spikes | {
        "framework": framework,
        "step": step,
        "data_digest": data_digest,
        "tokenizer": config.data.tokenizer,
        "model": dataclasses.asdict(config.model),
        **(figures or {}),
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
    """The file with a checkpoint's metadata: Orbax's path for an item called "metadata", which both trainers use."""
    return checkpoint / "metadata" / "metadata"


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    path = metadata_path(checkpoint)
    try:
        metadata = json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{checkpoint}: not a checkpoint of this project ({error})") from error
    for name in ("framework", "step", "data_digest", "tokenizer", "model"):
        if name not in metadata:
            raise UserError(f"{path}: has no {name!r}; not a checkpoint of this project")
    if metadata["framework"] not in ("jax", "torch") or not isinstance(metadata["model"], dict):
        raise UserError(f"{path}: not the metadata of a checkpoint of this project")
    return metadata


def losses_of(checkpoint: Path) -> list[float]:
    """The losses before a checkpoint's step, oldest first, by which the next spike is seen; none where the run that
    saved it didn't leave spikes out. Raises UserError for anything else."""
    losses = read_metadata(checkpoint).get("losses", [])
    if not isinstance(losses, list) or len(losses) > WINDOW or not all(map(_is_loss, losses)):
        raise UserError(f"{metadata_path(checkpoint)}: losses isn't a list of at most {WINDOW} numbers, 0 or more")
    return losses


def _is_loss(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without an incomplete last line of a killed run; raises UserError for a damaged
    one."""
    if not path.is_file():
        return []
    lines = read_text(path).split("\n")[:-1]
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line]


def _row(line: str, where: str) -> dict[str, Any]:
    row = json_object(line, where)
    step, loss = row.get("step"), row.get("loss")
    if row.get("split") not in ("train", "val") or type(step) is not int or not isinstance(loss, int | float):
        raise UserError(f"{where}: expected split (train or val), step and loss; remove the line if it is damaged")
    return row


def recent_training_loss(rows: list[dict[str, Any]], step: int) -> float:
    """Mean of the last RECENT logged training losses before `step`, or of as many as there are; NaN for none."""
    losses = [row["loss"] for row in rows if row["split"] == "train" and row["step"] < step][-RECENT:]
    return sum(losses) / len(losses) if losses else math.nan


class Logged(NamedTuple):
    """What a run that goes on needs of the losses it has logged: the last WINDOW of training, and the best by which
    checkpoints are ranked."""

    losses: list[float]
    best: float


def logged(path: Path) -> Logged:
    """Of a metrics.jsonl, which needn't be there."""
    rows = read_metrics(path)
    train = [row["loss"] for row in rows if row["split"] == "train"]
    ranks = [row["loss"] for row in rows if row["split"] == "val"]
    ranks = ranks or [statistics.fmean(train[max(0, end - RECENT) : end]) for end in range(1, len(train) + 1)]
    return Logged(train[-WINDOW:], min(ranks, default=math.inf))


class Reference(NamedTuple):
    """Losses of training by step to compare a run's with, and whose they are."""

    name: str
    losses: dict[int, float]


def reference_of(config: TrainConfig) -> Reference | None:
    """The curve that `reference_curve` gives or names; raises UserError if it names no run that has logged a step."""
    asked = config.reference_curve
    if not asked:
        return None
    if not isinstance(asked, str):
        return Reference("published", asked)
    rows = read_metrics(RunFolder(Path(asked)).metrics)
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    if not losses:
        raise UserError(
            f"--reference_curve {asked}: not the folder of a run that has logged a step; give one, or losses by step "
            "({0: 10.97, 50: 5.25}), or null for none"
        )
    return Reference(asked, losses)


def _cut_metrics(path: Path, step: int, *, evaluated: bool) -> None:
    """Keep what happened before the checkpoint of `step`; the evaluation of that very step precedes its checkpoint."""
    last = {"train": step - 1, "val": step if evaluated else step - 1}
    _write_rows(path, (row for row in read_metrics(path) if row["step"] <= last[row["split"]]))


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
