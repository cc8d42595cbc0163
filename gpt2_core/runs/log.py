"""The log of a run: metrics.jsonl, progress on the terminal, curves.png."""

import contextlib
import errno
import io
import json
import math
import os
import shlex
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2_core.config import ResolvedConfig
from gpt2_core.errors import DivergedError, RunError
from gpt2_core.evaluation.published import PUBLISHED
from gpt2_core.files import write_atomically
from gpt2_core.runs.folder import RECENT, Logged, Reference, RunFolder, logged, read_metrics, reference_of
from gpt2_core.runs.summary import model_table
from gpt2_core.runs.trackers import Tracker, open_tracker
from gpt2_core.spikes import DEVIATIONS, LEAST, SMALLEST_DEVIATION, WINDOW

# Dense bfloat16 matrix rates from NVIDIA's datasheets, in FLOP/s, by what the driver calls the device. TF32's are half
# as high in each of them (A100: 156, H100 PCIe: 378, H100 and H200: 494.7 TFLOP/s).
_PEAK_BFLOAT16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
}

# Drawing the curves takes a second, as long as many steps of a small model.
SECONDS_BETWEEN_DRAWINGS = 30.0


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak rate of one device for this precision in FLOP/s, or None where it isn't known."""
    share = {"bfloat16": 1.0, "tf32": 0.5}.get(precision)
    peak = next((peak for name, peak in _PEAK_BFLOAT16_FLOPS.items() if name in device_name), None)
    return share and peak and share * peak


class Outcome(NamedTuple):
    """What a step's update was decided by, on the device and again here: the loss, the gradient norm before clipping,
    and the highest loss that isn't a spike (infinite where spikes aren't left out)."""

    loss: float
    grad_norm: float
    loss_limit: float = math.inf

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_update(self) -> bool:
        """Whether both trainers apply the update."""
        return self.is_finite and self.loss <= self.loss_limit

    @property
    def why_left_out(self) -> str:
        if not self.is_finite:
            return f"has loss {self.loss} and gradient norm {self.grad_norm}"
        return f"has loss {self.loss:.4f}, a spike above {self.loss_limit:.4f} (--skip_spikes)"


class RunLog:
    """Logs a run from `start_step` on. With `enabled=False` (all processes but the first) it writes nothing.

    `before` is what the run has logged before; None: what metrics.jsonl holds. All processes must have the same, to
    agree on whether the target loss is reached, and which loss is the best.
    `peak_flops` is that of all devices together; with None no MFU is logged.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: ResolvedConfig,
        *,
        start_step: int,
        peak_flops: float | None = None,
        enabled: bool = True,
        before: Logged | None = None,
    ) -> None:
        self._folder, self._config, self._peak_flops, self._enabled = folder, config, peak_flops, enabled
        self._reference = reference_of(config) if enabled else None  # which other hosts needn't have
        self._console = Console(markup=False, quiet=not enabled, highlight=False, soft_wrap=True)
        self._first_step = start_step
        self._last_step, self._last_time = start_step - 1, time.perf_counter()
        self._last_drawn = self._last_time
        self._val_loss: float | None = None
        self._before = before
        self._best, self._best_after = math.inf, -1
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._skipped = self._skipped_in_a_row = 0
        self._unwritten = b""
        self._tracker: Tracker | None = None
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._progress.add_task("", total=config.steps, completed=start_step, status="")

    def __enter__(self) -> "RunLog":
        losses, self._best = self._before or logged(self._folder.metrics)
        self._recent.extend(losses)
        self._window.extend(losses)
        if self._enabled:
            self._tracker = open_tracker(self._folder.path, self._config)
            self._file = self._folder.metrics.open("ab", buffering=0)
        self._progress.start()
        self._last_time = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._enabled:
            with self.going_on(self._folder.metrics):
                self._append()
            self._file.close()
            self._draw_curves()
            if self._tracker is not None:
                self._tracker.close()

    def say(self, message: str) -> None:
        self._console.print(message)

    def introduce(self, message: str, warnings: Sequence[str] = ()) -> None:
        """Print how the run computes, what a person should know of how it continues, and the table of its model."""
        self.say(message)
        if self._first_step == 0 and self._config.init_from is None:
            self.say(
                f"the weights are random, of seed {self._config.seed}; PyTorch and JAX draw different ones from one "
                "seed (to start both alike: train with --steps 0, and give both that run by --init_from)"
            )
        for warning in (*warnings, *self._config_warnings()):
            self.say(f"warning: {warning}")
        self._console.print(model_table(self._config))

    def train(self, step: int, outcome: Outcome, *, learning_rate: float) -> None:
        """Log the batch of `step`: its loss and gradient norm before clipping, and the rate of the update it led to.

        Of a batch whose update was left out `check_updates` has said so; one that isn't finite is no figure to log.
        """
        loss, grad_norm, _ = outcome
        now = time.perf_counter()
        steps = step - self._last_step
        seconds = (now - self._last_time) / steps
        self._last_step, self._last_time = step, now
        tokens_per_second = self._config.tokens_per_step / seconds
        flops = tokens_per_second * self._config.training_flops_per_token
        mfu = flops / self._peak_flops if self._peak_flops else None
        if not outcome.is_finite:
            return
        spike = self._spike(step, loss) if outcome.is_update else {}
        self._recent.append(loss)
        self._window.append(loss)
        if not self._config.data.validation_fraction:
            self._rank(step + 1, statistics.fmean(self._recent))
        skipped = {"skipped": self._skipped} if self._skipped else {}
        skipped |= {} if outcome.is_update else {"left_out": True}
        self._write(
            skipped
            | spike
            | {
                "step": step,
                "split": "train",
                "loss": loss,
                "lr": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": round(tokens_per_second, 1),
                "mfu": mfu and round(mfu, 4),
                "step_seconds": round(seconds, 6),
            }
        )
        words = f"loss {loss:.4f}  lr {learning_rate:.2e}  norm {grad_norm:.2f}  {tokens_per_second:,.0f} tok/s"
        words += f"  dt {1000 * seconds:.1f} ms" + (f"  mfu {mfu:.1%}" if mfu else "")
        if self._progress.disable:
            self.say(f"step {step:>6}  {words}")
        else:
            val = "" if self._val_loss is None else f"  val {self._val_loss:.4f}"
            self._progress.update(self._task, completed=step + 1, status=words + val)

    def _spike(self, step: int, loss: float) -> dict[str, float]:
        """By how many standard deviations a loss is above the mean of those before it, where that is a spike."""
        if len(self._window) < LEAST:
            return {}
        deviation = max(statistics.pstdev(self._window), SMALLEST_DEVIATION)
        deviations = (loss - statistics.fmean(self._window)) / deviation
        if deviations <= DEVIATIONS:
            return {}
        self.say(
            f"warning: step {step} has loss {loss:.4f}, {deviations:.1f} standard deviations above the mean of the "
            f"{len(self._window)} logged before it"
        )
        return {"spike": round(deviations, 2)}

    def check_updates(self, outcomes: Iterable[tuple[int, Outcome]]) -> None:
        """Count the updates that were left out among consecutive steps.

        Raises DivergedError where they are more in a row than `max_skipped_steps`.
        """
        for step, outcome in outcomes:
            if outcome.is_update:
                self._skipped_in_a_row = 0
                continue
            self._skipped += 1
            self._skipped_in_a_row += 1
            self.say(
                f"warning: step {step} {outcome.why_left_out}: its update is left out ({self._skipped} of this run)"
            )
            if self._skipped_in_a_row > self._config.max_skipped_steps:
                raise DivergedError(
                    f"step {step} {outcome.why_left_out}, and no update was made for {self._skipped_in_a_row} steps "
                    f"(--max_skipped_steps {self._config.max_skipped_steps}): {self._advice()}; what is needed to "
                    f"study it is in {self._folder.diverged}",
                    step,
                )

    def _rank(self, updates: int, loss: float) -> None:
        if loss < self._best:
            self._best, self._best_after = loss, updates

    def is_best(self, updates: int) -> bool:
        """Whether the loss by which the checkpoint after so many updates is ranked is the lowest so far."""
        return self._best_after == updates

    @property
    def figures(self) -> dict[str, float]:
        """The newest losses, as a checkpoint's metadata names them: of training the mean of the last ten logged."""
        training = {"training_loss": statistics.fmean(self._recent)} if self._recent else {}
        return training | ({} if self._val_loss is None else {"validation_loss": self._val_loss})

    @property
    def reached_target(self) -> bool:
        """Whether the mean of the last ten logged training losses is at or below the target loss."""
        target = self._config.target_loss
        if target is None or len(self._recent) < RECENT:
            return False
        return sum(self._recent) / RECENT <= target

    def evaluation(self, step: int, loss: float, figures: Mapping[str, float] | None = None) -> None:
        """Log the validation loss of the weights after `step` updates, and the figures of tasks by TASK/FIGURE; raises
        RunError if the loss isn't finite."""
        if not math.isfinite(loss):
            raise RunError(f"the validation loss of step {step} is {loss}: {self._advice()}")
        self._val_loss = loss
        self._rank(step, loss)
        figures = dict(figures or {})
        self._write({"step": step, "split": "val", "loss": loss} | figures)
        words = "".join(f"  {name} {value:.4f}" for name, value in figures.items())
        self.say(f"step {step:>6}  val loss {loss:.4f}{words}")

    def refuse_state(self, updates: int) -> NoReturn:
        """Raises RunError for a state after `updates` updates that isn't finite, instead of saving it."""
        raise RunError(f"the parameters or the optimizer's state after step {updates} aren't finite: {self._advice()}")

    def _advice(self) -> str:
        kept = self._folder.steps()
        return "the run has diverged; try a lower --optimizer.learning_rate or a longer --optimizer.warmup_steps" + (
            f" (the newest checkpoint is step {kept[-1]})" if kept else ""
        )

    @contextlib.contextmanager
    def going_on(self, path: Path) -> Iterator[None]:
        """What the disk refuses of writing `path` is a warning, and training goes on."""
        try:
            yield
        except OSError as error:
            self.say(f"warning: {path} can't be written ({error.strerror or error}); training goes on")

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the time inside (evaluations, checkpoints, samples) from the training throughput."""
        start = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - start

    def _config_warnings(self) -> Iterator[str]:
        steps, warmup = self._config.steps, self._config.optimizer.warmup_steps
        if 0 < steps < warmup:
            yield (
                f"--optimizer.warmup_steps {warmup}: the run has only {steps} steps, so the learning rate rises to "
                f"{steps / warmup:.0%} of its peak and never falls; give fewer, or more --steps"
            )
        length, model = self._config.tokens_per_sequence, self._config.model
        if length < model.block_size and model.position == "learned" and self._config.init_from is None:
            yield (
                f"--sequence_length {length}: the positions from {length} to {model.block_size - 1} are not trained; "
                f"expect poor results on texts longer than {length} tokens"
            )

    def end(self, updates: int, command: str) -> None:
        """Print why a run ends after so many updates, where its results are and what can be done with them; nothing if
        it was told to stop. `command` is the one that continues it."""
        if updates < self._config.steps and not self.reached_target:
            return
        if self.reached_target:
            self.say(
                f"the mean of the last {RECENT} logged training losses is {sum(self._recent) / RECENT:.4f}, at most "
                f"--target_loss {self._config.target_loss}: the run ends here"
            )
        elif 0 < self._config.steps == self._first_step:
            self.say(f"the run had made its {updates} steps before; --steps with a larger number trains it further")
        folder = shlex.quote(str(self._folder.path))
        samples = ", samples" if self._folder.samples.is_dir() else ""
        self.say(f"results are in {folder}: checkpoints, curves.png, metrics.jsonl{samples}, config.yaml")
        self.say(f"  generate a text:  gpt2 generate --weights {folder}")
        self.say(f"  check its parity: gpt2 parity --quick --weights {folder}")
        if not self.reached_target:
            self.say(f"  train it further: {command} --resume --run_dir {folder} --steps {2 * max(1, updates)}")

    def update_curves(self) -> None:
        """Draw the curves of the run so far, if they were not drawn lately; at its end they are drawn in any case."""
        if self._enabled and time.perf_counter() - self._last_drawn >= SECONDS_BETWEEN_DRAWINGS:
            self._draw_curves()
            self._last_drawn = time.perf_counter()

    def _draw_curves(self) -> None:
        with self.going_on(self._folder.curves):
            draw_curves(read_metrics(self._folder.metrics), self._folder.curves, self._reference)

    def _write(self, row: dict[str, Any]) -> None:
        if self._enabled:
            self._unwritten += json.dumps(row).encode() + b"\n"
            with self.going_on(self._folder.metrics):
                self._append()
            self._track(row)

    def _append(self) -> None:
        """Write the rows that aren't in metrics.jsonl yet, whole or not at all: they are tried again with the next."""
        size = self._file.seek(0, io.SEEK_END)
        try:
            if self._file.write(self._unwritten) != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(size)
            raise
        self._unwritten = b""

    def _track(self, row: dict[str, Any]) -> None:
        if self._tracker is None:
            return
        values = {f"{row['split']}/{name}": value for name, value in row.items() if isinstance(value, float)}
        try:
            self._tracker.log(row["step"], values)
        except Exception as error:  # a tracker's server that is down must not end the run
            self.say(f"warning: --track {self._config.track} has failed ({error}); continuing without it")
            self._tracker = None


def draw_curves(rows: list[dict[str, Any]], path: Path, reference: Reference | None = None) -> None:
    """Loss, learning rate, gradient norm and throughput over the steps, as a PNG; `reference` is another run's loss."""
    from matplotlib.figure import Figure

    train = [row for row in rows if row["split"] == "train"]
    val = [row for row in rows if row["split"] == "val"]
    if not train:
        return
    tasks = sorted({key for row in val for key in row if "/" in key})
    figure = Figure(figsize=(15 if tasks else 10, 6.5), layout="constrained")
    axes = figure.subplots(2, 3 if tasks else 2).ravel()
    steps = [row["step"] for row in train]
    axes[0].plot(steps, [row["loss"] for row in train], color="tab:blue", linewidth=1, label="training")
    if spikes := [(row["step"], row["loss"]) for row in train if {"spike", "left_out"} & row.keys()]:
        axes[0].plot(*zip(*spikes, strict=True), "v", color="tab:red", label="spike")
    if val:
        axes[0].plot(
            [row["step"] for row in val],
            [row["loss"] for row in val],
            color="tab:orange",
            marker="o",
            label="validation",
        )
    if reference:
        # Crosses on the few points of a published run; a run of one's own has many.
        points, mark = sorted(reference.losses.items()), "x" if len(reference.losses) <= 50 else None
        axes[0].plot(*zip(*points, strict=True), "k--", marker=mark, linewidth=1, label=reference.name)
    axes[0].legend(frameon=False)
    panels = [("learning rate", "lr"), ("gradient norm", "grad_norm"), ("tokens per second", "tokens_per_second")]
    for axis, (title, key) in zip(axes[1:4], panels, strict=True):
        axis.plot(steps, [row[key] for row in train], color="tab:blue", linewidth=1)
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    axes[0].set_title("loss (nats per token)")
    if tasks:
        _draw_tasks(axes[4], val, [name for name in tasks if "/acc" in name], "accuracy")
        _draw_tasks(axes[5], val, [name for name in tasks if name.endswith("perplexity")], "perplexity")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_atomically(path, image.getvalue())


def _draw_tasks(axis: Any, val: list[dict[str, Any]], names: Sequence[str], title: str) -> None:
    """Figures of tasks over the steps, and OpenAI's gpt2 as a line where its figure is published."""
    for number, name in enumerate(names):
        points = [(row["step"], row[name]) for row in val if name in row]
        axis.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", label=name)
        known = PUBLISHED.get(tuple(name.split("/")))
        if known and "gpt2" in known.figures:
            axis.axhline(known.figures["gpt2"], color=f"C{number}", linestyle="--", linewidth=1, label="OpenAI's gpt2")
    axis.set_title(title)
    axis.set_visible(bool(names))
    if names:
        axis.legend(frameon=False)
