"""Check `trainer`: both trainers end to end, from `--init_from` to the last checkpoint, against a plain loop.

A tiny model is trained as the two commands train it: interrupted or told to stop, and resumed, on other devices too,
with accumulation, clipping, a validation split whose last batch is padded, samples, and few checkpoints kept.
Every logged figure, the states in the checkpoints, which of them are kept, and the samples are compared with
`parity.plain_loop`. So each trainer is judged by itself, and what the two share is seen where it is wrong.
"""

import contextlib
import dataclasses
import gc
import io
import itertools
import math
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np

import gpt2_core.runs.log
import gpt2_torch.train
from gpt2_convert import read_initial_weights, read_weights, write_weights
from gpt2_core.config import NEWEST, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gpt2_core.errors import Stopped
from gpt2_core.runs.folder import RunFolder, read_metadata, read_metrics
from gpt2_core.weights import Weights
from gpt2_torch.model import GPT2
from gpt2_torch.weights import build
from parity.engine.adapter import lacking
from parity.engine.results import Result, Skipped, relative_norm
from parity.gpt2 import limits, plain_loop
from parity.gpt2.adapters.protocol import (
    GRADIENTS,
    INITIALIZATION,
    MESH,
    PROCESSES,
    TRAINER,
    Adapter,
    Arrays,
    Trainer,
    TrainerState,
)
from parity.gpt2.cases import Case, Level, random_weights
from parity.gpt2.plain_loop import Outcome, Text

_MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)
# Past a checkpoint, and no step that is evaluated: a resumed run takes back what was logged since.
_INTERRUPTED_AT = 6
# In the order of dependence: the rate follows from the step alone, the loss from all rates before.
_WORDS = {"lr": "learning rate", "loss": "loss", "grad_norm": "gradient norm"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every run of the check starts from."""

    folder: Path
    text: Text
    weights: Weights
    config: TrainConfig
    """Its numbers are chosen so that every interval ends at another step, and nothing divides evenly."""

    def due(self, config: TrainConfig) -> Outcome:
        return plain_loop.run(config, self.weights, self.text)


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    with tempfile.TemporaryDirectory() as folder:
        setting = _setting(case, Path(folder), reference.device)
        seen, wrong = plain_loop.wrong_batches(setting.text, setting.config)
        where = "; ".join(wrong) or "every window once an epoch, targets the inputs that follow"
        yield Result("trainer", f"batches: {seen} sequences", float(len(wrong)), limits.NONE, where)
        due, trained = setting.due(setting.config), []
        # The reference first, which has nothing to compile: what is wrong there, or in both, shows after a second.
        for adapter in (reference, candidate):
            if skipped := lacking("trainer", "runs from end to end", (adapter, TRAINER)):
                yield skipped
                continue
            trained.append(adapter)
            trainer = adapter.trainer()
            run = (trainer, setting.config)
            yield from _interrupted(f"{trainer.name}, interrupted and resumed", setting, due, run, run)
            if case.at(False, True):
                yield from _told_to_stop(setting, due, trainer)
            if skipped := lacking("trainer", "initial weights", (adapter, INITIALIZATION)):
                yield skipped
            elif adapter is reference or case.at(False, True):
                yield _from_random_weights(adapter, setting)
            if adapter is reference or case.level == "full":
                yield from _dropout(trainer, setting)
            if case.level == "full" or (adapter is reference and case.level == "default"):
                yield from _continued_elsewhere(trainer, setting, due)
        if case.at(False, True):
            for adapter in trained:
                if skipped := lacking("trainer", "the first losses in bfloat16", (adapter, GRADIENTS)):
                    yield skipped
                else:
                    yield from _in_bfloat16(adapter, setting)
            yield from _without_validation([adapter.trainer() for adapter in reversed(trained)], setting)
            yield from _on_other_devices(candidate, reference, setting, case.level)


def _setting(case: Case, folder: Path, device: str) -> Setting:
    block_size = _MODEL.block_size
    ids = case.tokens % _MODEL.vocab_size
    first, second, third = np.split(ids, np.cumsum([11 * block_size + 6, 7 * block_size + 1]))
    # Validation text of another alphabet: training makes its loss worse, so the best checkpoint isn't the newest.
    val = (third[: 11 * block_size + 1] + _MODEL.vocab_size // 2) % _MODEL.vocab_size
    text = Text((first, second), val)
    tokens = folder / "tokens"
    tokens.mkdir()
    for name, shard in (("train-0", first), ("train-1", second), ("val", val)):
        shard.astype("<u2").tofile(tokens / f"{name}.bin")
    weights = random_weights(_MODEL, case.seed)
    write_weights(weights, folder / "weights.safetensors", "safetensors")
    config = TrainConfig(
        model=_MODEL,
        data=DataConfig(tokens=str(tokens), tokenizer="bytes"),
        # An epsilon above the rounding of gradients that are zero but for it, such as those of the keys' biases.
        optimizer=OptimizerConfig(
            learning_rate=1e-2,
            final_fraction=0.2,
            warmup_steps=3,
            weight_decay=0.2,
            beta1=0.85,
            beta2=0.97,
            epsilon=1e-6,
            clip_norm=0.25,
        ),
        steps=12,
        batch_size=4,
        accumulation=2,
        precision="float64",
        seed=case.seed + 7,  # none of the numbers that a mistake would put in its place: 0, 1, 1337
        mesh=1,
        device=device,
        compile=False,
        init_from=str(folder / "weights.safetensors"),
        log_interval=2,
        eval_interval=4,
        eval_sequences=7,
        checkpoint_interval=5,
        keep_checkpoints=1,
        sample_interval=3,
        sample_tokens=9,
    )
    return Setting(folder, text, weights, config)


def _interrupted(
    title: str, setting: Setting, due: Outcome, begun: tuple[Trainer, TrainConfig], ended: tuple[Trainer, TrainConfig]
) -> Iterator[Result]:
    """Trained until an exception between two checkpoints, and from the newest of them to the end."""
    trainer, config = begun
    config = _named(setting, config, title)
    interrupted = _run(trainer, config, interrupt_at=_INTERRUPTED_AT)
    where = f"as step {_INTERRUPTED_AT} is logged"
    yield Result("trainer", f"{title}: an exception ends the run", float(not interrupted), limits.NONE, where)
    trainer, resumed = ended
    resumed = dataclasses.replace(resumed, run_dir=config.run_dir, resume=NEWEST)
    _run(trainer, resumed)
    yield from _compare(title, trainer, resumed, due)


def _told_to_stop(setting: Setting, due: Outcome, trainer: Trainer) -> Iterator[Result]:
    """Trained until SIGTERM between two checkpoints, saved there, and from there to the end."""
    title = f"{trainer.name}, told to stop and resumed"
    config = _named(setting, setting.config, title)
    stopped = _run(trainer, config, interrupt_at=_INTERRUPTED_AT, by=lambda: signal.raise_signal(signal.SIGTERM))
    newest = RunFolder(Path(config.run_dir)).steps()[-1]
    saved = stopped and _INTERRUPTED_AT < newest < config.steps
    where = f"as step {_INTERRUPTED_AT} is logged; the newest checkpoint is {newest}"
    yield Result("trainer", f"{title}: SIGTERM ends and saves the run", float(not saved), limits.NONE, where)
    resumed = dataclasses.replace(config, resume=NEWEST)
    _run(trainer, resumed)
    yield from _compare(title, trainer, resumed, due)


def _uninterrupted(
    title: str, setting: Setting, due: Outcome, trainer: Trainer, config: TrainConfig
) -> Iterator[Result]:
    config = _named(setting, config, title)
    _run(trainer, config)
    yield from _compare(title, trainer, config, due)


def _from_random_weights(adapter: Adapter, setting: Setting) -> Result:
    """A run of no steps, whose checkpoint has what it would begin with: the weights of its seed."""
    trainer = adapter.trainer()
    title = f"{trainer.name}: initial weights of a run's seed"
    config = _named(setting, dataclasses.replace(setting.config, init_from=None, steps=0), title.replace(":", ""))
    _run(trainer, config)
    found = read_weights(config.run_dir).arrays
    due = adapter.initialize(config.model, config.seed)
    wrong = [name for name in due if not np.allclose(found[name], due[name], rtol=1e-5, atol=0.0)]
    return Result("trainer", title, float(len(wrong)), limits.NONE, wrong[0] if wrong else f"{len(due)} tensors")


def _continued_elsewhere(trainer: Trainer, setting: Setting, due: Outcome) -> Iterator[Result]:
    """From a checkpoint of a run that was interrupted, named by its path, to the end in a folder of its own."""
    title = f"{trainer.name}, continued in another folder"
    begun = _named(setting, setting.config, f"{title}: begun")
    _run(trainer, begun, interrupt_at=_INTERRUPTED_AT)
    folder = RunFolder(Path(begun.run_dir))
    start = folder.steps()[-1]
    rows = [row for row in due.rows if row["step"] >= start + (row["split"] == "val")]
    samples = {updates: text for updates, text in due.samples.items() if updates > start}
    kept, best = plain_loop.kept_and_best(rows, [updates for updates in due.states if updates > start], setting.config)
    due = dataclasses.replace(due, rows=rows, samples=samples, kept=kept, best=best)
    resumed = dataclasses.replace(setting.config, resume=str(folder.checkpoints / str(start)))
    yield from _uninterrupted(title, setting, due, trainer, resumed)


def _in_bfloat16(adapter: Adapter, setting: Setting) -> Iterator[Result]:
    """What a run of bfloat16 logs before its first update, against the losses of the same adapter in bfloat16: training
    and evaluation both compute in the precision that was asked for, and not in float32."""
    config = dataclasses.replace(setting.config, precision="bfloat16", steps=1, accumulation=1, sample_interval=0)
    batch = plain_loop.training_batches(setting.text, config, config.seed)[0]
    validation = plain_loop.validation_batch(config, setting.text)
    with jax.enable_x64(False):
        named = _named(setting, config, f"{adapter.name}, in bfloat16")
        _run(adapter.trainer(), named)
        rows = read_metrics(Path(named.run_dir) / "metrics.jsonl")
        for what, split, of in (("training", "train", batch), ("evaluation", "val", validation)):
            logged = next(row["loss"] for row in rows if row["split"] == split)
            due, other = (
                adapter.make(setting.weights, dtype).loss_and_grads(of, 1)[0] for dtype in ("bfloat16", "float32")
            )
            title = f"{adapter.name}, in bfloat16: the first loss of {what}"
            where = f"{logged:.8f} where {due:.8f} is due; in float32 it would be {other:.8f}"
            yield Result("trainer", title, abs(logged - due) / due, limits.BFLOAT16_LOSS, where)


def _without_validation(trainers: list[Trainer], setting: Setting) -> Iterator[Result]:
    """The training losses choose the best checkpoint; so many epochs are rounded up to a whole step."""
    data = dataclasses.replace(setting.config.data, validation_fraction=0.0)
    config = dataclasses.replace(setting.config, data=data, epochs=1.2, checkpoint_interval=2, log_interval=1)
    due = setting.due(config)
    for trainer in trainers:
        yield from _uninterrupted(f"{trainer.name}, without validation", setting, due, trainer, config)


def _on_other_devices(
    candidate: Adapter, reference: Adapter, setting: Setting, level: Level
) -> Iterator[Result | Skipped]:
    """Runs of so many epochs that end at a target loss, begun on some devices and resumed on others."""
    config = dataclasses.replace(setting.config, epochs=4, accumulation=1, device_batch_size=2, log_interval=1)
    losses = [row["loss"] for row in setting.due(config).rows if row["split"] == "train"]
    # Reached between the tenth and the last step.
    target = sum(np.mean(losses[end - 10 : end]) for end in (12, 13)) / 2
    config = dataclasses.replace(config, target_loss=float(target))
    due, name = setting.due(config), candidate.name
    if skipped := lacking("trainer", f"{name} on data=2", (candidate, TRAINER), (candidate, MESH)):
        yield skipped
    elif candidate.devices() < 2:
        yield Skipped("trainer", f"{name} on data=2: needs 2 devices and there is 1")
    else:
        trainer = candidate.trainer()
        on_two = (trainer, dataclasses.replace(config, mesh="data=2"))
        yield from _interrupted(f"{name} on data=2, resumed on one device", setting, due, on_two, (trainer, config))
        if level == "full":
            parts = dataclasses.replace(config, mesh="fsdp=2", device_batch_size=1, scan_layers=True, remat=True)
            yield from _uninterrupted(f"{name} on fsdp=2, scanned, rematerialised", setting, due, trainer, parts)
    # One sequence at once: each of the two accumulates as well.
    config, name = dataclasses.replace(config, device_batch_size=1), reference.name
    if skipped := lacking("trainer", f"{name} by two processes", (reference, TRAINER), (reference, PROCESSES)):
        yield skipped
    elif isinstance(by_two := reference.trainer_of_processes(), str):
        yield Skipped("trainer", f"{name} by two processes: {by_two}")
    else:
        of_two = (by_two, config)
        begun = (reference.trainer(), config)
        yield from _interrupted(f"{name}, resumed by two processes", setting, due, begun, of_two)
        if level == "full":
            yield from _uninterrupted(f"{name} by two processes", setting, due, *of_two)


def _dropout(trainer: Trainer, setting: Setting) -> Iterator[Result]:
    """With dropout the plain loop can't follow. But evaluations have none, and neither they nor samples, checkpoints
    and interruptions change the training."""
    model = dataclasses.replace(_MODEL, dropout=0.2)
    config = dataclasses.replace(setting.config, model=model, steps=4, log_interval=1)
    rare = _named(setting, dataclasses.replace(config, eval_interval=4, sample_interval=0), f"{trainer.name}, rare")
    often = dataclasses.replace(config, eval_interval=1, sample_interval=1, checkpoint_interval=2, keep_checkpoints=4)
    often = _named(setting, often, f"{trainer.name}, often")
    _run(trainer, rare)
    _run(trainer, often, interrupt_at=2)
    _run(trainer, dataclasses.replace(often, resume=NEWEST))
    watched, unwatched = (read_metrics(Path(c.run_dir) / "metrics.jsonl") for c in (often, rare))

    title = f"{trainer.name}, dropout"
    training = [[row for row in rows if row["split"] == "train"] for rows in (watched, unwatched)]
    measured, _, where = _differing_steps(*training)
    if not measured:
        measured, where = _first_difference(*training)
    yield Result("trainer", f"{title}: watched, interrupted and resumed, or neither", measured, limits.CURVE, where)

    folder = RunFolder(Path(often.run_dir))
    params = {0: setting.weights.arrays} | {
        step: trainer.state(folder.checkpoints / str(step), often).params for step in folder.steps()
    }
    due = [
        {
            "split": "val",
            "step": step,
            "loss": plain_loop.evaluation(_model(setting, params[step]), often, setting.text),
        }
        for step in params
    ]
    evaluated = [row for row in watched if row["split"] == "val" and row["step"] in params]
    measured, where = _first_difference(evaluated, due)
    yield Result("trainer", f"{title}: evaluations leave it out", measured, limits.CURVE, where)

    # Without updates, and on a text whose windows are all the same, nothing but the masks tells steps apart.
    tokens = setting.folder / "one-window"
    tokens.mkdir(exist_ok=True)
    np.resize(setting.text.val[: _MODEL.block_size], 20 * _MODEL.block_size).astype("<u2").tofile(tokens / "train.bin")
    still = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokens=str(tokens), validation_fraction=0.0),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=0.0),
        sample_interval=0,
    )
    still = _named(setting, still, f"{trainer.name}, still")
    _run(trainer, still)
    losses = [row["loss"] for row in read_metrics(Path(still.run_dir) / "metrics.jsonl")]
    equal = config.steps - len(set(losses))
    where = f"losses {', '.join(f'{loss:.6f}' for loss in losses)} of one batch and the same weights"
    yield Result("trainer", f"{title}: every step has masks of its own", float(equal), limits.NONE, where)


def _model(setting: Setting, arrays: Arrays) -> GPT2:
    weights = dataclasses.replace(setting.weights, arrays={n: a.astype(np.float64) for n, a in arrays.items()})
    return build(weights).to(setting.config.device)


# --- running


def _named(setting: Setting, config: TrainConfig, title: str) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(setting.folder / title.replace(", ", "-").replace(" ", "-")))


def _interrupt() -> None:
    raise KeyboardInterrupt


def _run(
    trainer: Trainer, config: TrainConfig, interrupt_at: int | None = None, by: Callable[[], None] = _interrupt
) -> bool:
    """Train without a word; whether what `by` does as the batch of `interrupt_at` is logged ended it."""
    log, pressed = gpt2_core.runs.log.RunLog.train, False

    def logging(self, step: int, **figures: float) -> None:
        nonlocal pressed
        log(self, step, **figures)
        if step == interrupt_at:
            pressed = True
            by()

    # What is older than the run needs no search for cycles after it, and is most of what there is.
    gc.freeze()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        # No number hangs on either, and each takes longer than all the steps.
        mock.patch.object(gpt2_core.runs.log, "draw_curves"),
        mock.patch.object(gpt2_torch.train, "check_memory"),
        mock.patch.object(gpt2_core.runs.log.RunLog, "train", logging),
    ):
        try:
            trainer.train(config, read_initial_weights)
            pressed = False
        except (KeyboardInterrupt, Stopped):
            if not pressed:
                raise
        finally:
            # The folder is locked as long as anything refers to its plan; a command's process would be over.
            gc.collect()
            gc.unfreeze()
    return pressed


# --- comparing


def _compare(title: str, trainer: Trainer, config: TrainConfig, due: Outcome) -> Iterator[Result]:
    """What the run of `config` left, against what is due."""
    folder = RunFolder(Path(config.run_dir))
    rows = read_metrics(folder.metrics)
    yield Result("trainer", f"{title}: logged steps", *_differing_steps(rows, due.rows))
    measured, where = _first_difference(rows, due.rows)
    yield Result("trainer", f"{title}: figures", measured, limits.CURVE, where)
    yield Result("trainer", f"{title}: tokens a step", *_wrong_tokens(rows, config))

    # By what their metadata says, which a name must agree with.
    kept = [read_metadata(folder.checkpoints / str(step))["step"] for step in folder.steps()]
    best = folder.best_step()
    differ = (kept, best) != (due.kept, due.best)
    where = f"kept {kept}, best {best}" + (f", where {due.kept} and {due.best} are due" if differ else "")
    yield Result("trainer", f"{title}: checkpoints", float(differ), limits.NONE, where)
    states = {step: trainer.state(folder.checkpoints / str(step), config) for step in folder.steps()}
    measured, where = _first_difference_of_states(states, due.states)
    yield Result("trainer", f"{title}: states", measured, limits.STEP, where)

    samples = {int(path.stem): path.read_bytes() for path in folder.samples.glob("*.txt")}
    wrong = [step for step in sorted({*samples, *due.samples}) if samples.get(step) != due.samples.get(step)]
    where = f"{len(due.samples)} of them"
    if wrong:
        where = f"after {wrong[0]} updates: {samples.get(wrong[0])} where {due.samples.get(wrong[0])} is due"
    yield Result("trainer", f"{title}: samples", float(len(wrong)), limits.NONE, where)


def _differing_steps(rows: list[dict], due: list[dict]) -> tuple[float, float, str]:
    """Rows that are missing, too many or out of order."""
    found, expected = ([_in_words(row) for row in of] for of in (rows, due))
    if found == expected:
        return 0.0, 0.0, f"{len(found)} rows"
    paired = list(itertools.zip_longest(found, expected, fillvalue="nothing"))
    first = next((a, b) for a, b in paired if a != b)
    return float(sum(a != b for a, b in paired)), 0.0, f"{first[0]} where {first[1]} is due"


def _first_difference(rows: list[dict], due: list[dict]) -> tuple[float, str]:
    """The largest relative difference of the figures of two logs, and where the first is that is more than rounding."""
    found = {(row["split"], row["step"]): row for row in rows}
    both = [(found[key], row) for row in due if (key := (row["split"], row["step"])) in found]
    compared = [
        (f"{_in_words(row)}, {word}: {ours[name]:.12g} where {row[name]:.12g} is due", ours[name], row[name])
        for ours, row in both
        for name, word in _WORDS.items()
        if name in row
    ]
    return _first_beyond([(where, abs(a - b) / abs(b)) for where, a, b in compared], limits.CURVE)


def _first_difference_of_states(found: dict[int, TrainerState], due: dict[int, TrainerState]) -> tuple[float, str]:
    """The same for the states of checkpoints: relative norms, the second moments first, which gradients make."""
    compared = []
    for step in sorted(found.keys() & due):
        ours, theirs = found[step], due[step]
        counts = f"checkpoint {step}, {ours.updates} updates where {theirs.updates} are due"
        compared.append((counts, float(abs(ours.updates - theirs.updates))))
        compared += [
            (
                f"checkpoint {step}, {kind.replace('_', ' ')[:-1]} {name}",
                relative_norm(getattr(ours, kind)[name], array),
            )
            for kind in ("second_moments", "first_moments", "params")
            for name, array in getattr(theirs, kind).items()
        ]
    return _first_beyond(compared, limits.STEP)


def _first_beyond(compared: list[tuple[str, float]], limit: float) -> tuple[float, str]:
    """The largest difference, and where the first is beyond the limit, or else the largest."""
    if not compared:
        return math.inf, "nothing to compare"
    wrong = [number for number, (_, difference) in enumerate(compared) if not difference <= limit]
    differences = np.array([difference for _, difference in compared])
    if not wrong:
        return float(differences.max()), f"largest at {compared[differences.argmax()][0]}"
    before = f"; everything before agrees to {differences[: wrong[0]].max():.0e}" if wrong[0] else ""
    return float(differences.max()), compared[wrong[0]][0] + before


def _wrong_tokens(rows: list[dict], config: TrainConfig) -> tuple[float, float, str]:
    """Tokens a second times seconds a step, as a share of what rounding them in the log may change."""
    shares = [0.0]
    for row in rows:
        if row["split"] == "train":
            rate, seconds = row["tokens_per_second"], row["step_seconds"]
            tokens = config.batch_size * config.model.block_size
            shares.append(abs(rate * seconds - tokens) / (0.051 * seconds + 0.51e-6 * rate))
    return max(shares), 1.0, f"{config.batch_size} x {config.model.block_size}"


def _in_words(row: dict) -> str:
    return f"step {row['step']}" if row["split"] == "train" else f"validation after {row['step']} updates"
