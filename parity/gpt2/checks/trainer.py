"""Check `trainer`: both trainers end to end, from `--init_from` to the last checkpoint, against a plain loop.

A tiny model is trained as the two commands train it: interrupted or told to stop, and resumed, on other devices too,
with accumulation, clipping, a validation split whose last batch is padded, samples, and few checkpoints kept.
Every logged figure, the states in the checkpoints, which of them are kept, and the samples are compared with
`parity.plain_loop`. So each trainer is judged by itself, and what the two share is seen where it is wrong.
"""

import dataclasses
import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from gpt2_convert import read_weights, write_weights
from gpt2_core.config import NEWEST, TrainConfig
from gpt2_core.errors import DivergedError
from gpt2_core.runs.folder import RunFolder, read_metrics
from gpt2_torch.model import GPT2
from gpt2_torch.weights import build
from parity.engine.adapter import lacking
from parity.engine.results import Result, Skipped
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
)
from parity.gpt2.cases import Case, Level
from parity.gpt2.plain_loop import Outcome
from parity.gpt2.trainer_results import compare, differing_steps, first_difference
from parity.gpt2.trainer_runs import INTERRUPTED_AT, MODEL, Setting, named, run, setting_of


def check(case: Case, candidate: Adapter, reference: Adapter) -> Iterator[Result | Skipped]:
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(case, Path(folder), reference.device)
        yield _batches("batches", setting, setting.config)
        yield _batches("shorter batches in the order of the text", setting, _in_order(setting.config))
        yield _best_checkpoints(setting)
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
                yield from _diverging(setting, trainer)
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


def _interrupted(
    title: str, setting: Setting, due: Outcome, begun: tuple[Trainer, TrainConfig], ended: tuple[Trainer, TrainConfig]
) -> Iterator[Result]:
    """Trained until an exception between two checkpoints, and from the newest of them to the end."""
    trainer, config = begun
    config = named(setting, config, title)
    interrupted = run(trainer, config, interrupt_at=INTERRUPTED_AT)
    where = f"as step {INTERRUPTED_AT} is logged"
    yield Result("trainer", f"{title}: an exception ends the run", float(not interrupted), limits.NONE, where)
    trainer, resumed = ended
    resumed = dataclasses.replace(resumed, run_dir=config.run_dir, resume=NEWEST)
    run(trainer, resumed)
    yield from compare(title, trainer, resumed, due)


def _batches(title: str, setting: Setting, config: TrainConfig) -> Result:
    seen, wrong = plain_loop.wrong_batches(setting.text, config)
    where = "; ".join(wrong) or "every window once an epoch, targets the inputs that follow"
    return Result("trainer", f"{title}: {seen} sequences", float(len(wrong)), limits.NONE, where)


def _in_order(config: TrainConfig) -> TrainConfig:
    """Sequences shorter than the model's context, in the order of the text."""
    data = dataclasses.replace(config.data, order="sequential")
    return dataclasses.replace(config, data=data, sequence_length=config.model.block_size - 5)


def _best_checkpoints(setting: Setting) -> Result:
    """The best checkpoint by random logs, of runs with evaluations and of runs without."""
    generator, wrong, logs = np.random.default_rng(setting.config.seed), [], 60
    for number in range(logs):
        folder = RunFolder(setting.folder / f"log-{number}")
        steps = sorted(generator.choice(40, size=5, replace=False).tolist())
        for step in steps:
            (folder.checkpoints / str(step)).mkdir(parents=True)
        rows = [
            {"split": "train", "step": step, "loss": generator.uniform(1, 9)} for step in range(0, 40, 1 + number % 3)
        ]
        if number % 2:
            rows += [{"split": "val", "step": step, "loss": generator.uniform(1, 9)} for step in steps]
        rows.sort(key=lambda row: (row["step"], row["split"] == "train"))
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        # Without a training loss before it a checkpoint has no rank, and without a rank it isn't the best.
        ranked = [step for step in steps if number % 2 or step > 0]
        found, (_, due) = folder.best_step(), plain_loop.kept_and_best(rows, ranked, setting.config)
        wrong += [] if found == due else [f"log {number}: {found} where {due} is due"]
    title = f"the best checkpoint by each of {logs} logs"
    return Result("trainer", title, float(len(wrong)), limits.NONE, wrong[0] if wrong else "")


def _told_to_stop(setting: Setting, due: Outcome, trainer: Trainer) -> Iterator[Result]:
    """Trained until SIGTERM between two checkpoints, saved there, and from there to the end."""
    title = f"{trainer.name}, told to stop and resumed"
    config = named(setting, setting.config, title)
    stopped = run(trainer, config, interrupt_at=INTERRUPTED_AT, by=lambda: signal.raise_signal(signal.SIGTERM))
    newest = RunFolder(Path(config.run_dir)).steps()[-1]
    saved = stopped and INTERRUPTED_AT < newest < config.steps
    where = f"as step {INTERRUPTED_AT} is logged; the newest checkpoint is {newest}"
    yield Result("trainer", f"{title}: SIGTERM ends and saves the run", float(not saved), limits.NONE, where)
    resumed = dataclasses.replace(config, resume=NEWEST)
    run(trainer, resumed)
    yield from compare(title, trainer, resumed, due)


def _diverging(setting: Setting, trainer: Trainer) -> Iterator[Result]:
    """A run whose logits overflow from its first step: no update is applied, and it ends after so many, with what is
    needed to study it."""
    title = f"{trainer.name}, diverging"
    arrays = {name: array.astype(np.float64) for name, array in setting.weights.arrays.items()}
    arrays["ln_f.weight"] = np.full_like(arrays["ln_f.weight"], np.finfo(np.float64).max)
    start = setting.folder / "overflowing.safetensors"
    if not start.exists():
        write_weights(dataclasses.replace(setting.weights, arrays=arrays), start, "safetensors")
    # Without a validation split, whose loss would end the run before its first step.
    data = dataclasses.replace(setting.config.data, validation_fraction=0.0)
    config = dataclasses.replace(
        setting.config, data=data, init_from=str(start), max_skipped_steps=1, sample_interval=0
    )
    config = named(setting, config, title)
    try:
        run(trainer, config)
        ended, where = False, "it went on"
    except DivergedError as error:
        ended, where = error.step == config.max_skipped_steps, f"at step {error.step}"
    yield Result("trainer", f"{title}: ends after two updates that are left out", float(not ended), limits.NONE, where)

    folder = RunFolder(Path(config.run_dir))
    states = {step: trainer.state(folder.checkpoints / str(step), config) for step in folder.steps()}
    moved = [
        f"checkpoint {step}, {kind.replace('_', ' ')} {name}"
        for step, state in states.items()
        for kind, due in (("params", arrays), ("first_moments", {}), ("second_moments", {}))
        for name, array in getattr(state, kind).items()
        if not np.array_equal(array, due.get(name, np.zeros_like(array)))
    ]
    where = moved[0] if moved else f"saved after {', '.join(map(str, states))} steps: the weights as they were given"
    yield Result("trainer", f"{title}: state", float(len(moved) if states else 1), limits.NONE, where)

    found = json.loads((folder.diverged / "step.json").read_text(encoding="utf-8")) if ended else {}
    size = config.batch_size
    due = {"step": 1, "sequences": list(range(size, 2 * size)), "first_module_not_finite": "ln_f"}
    wrong = [
        f"{name} {found.get(name)} where {value} is due" for name, value in due.items() if found.get(name) != value
    ]
    where = wrong[0] if wrong else "its batch, and ln_f, whose output is the first that isn't finite"
    yield Result("trainer", f"{title}: what is kept to study", float(len(wrong)), limits.NONE, where)


def _uninterrupted(
    title: str, setting: Setting, due: Outcome, trainer: Trainer, config: TrainConfig
) -> Iterator[Result]:
    config = named(setting, config, title)
    run(trainer, config)
    yield from compare(title, trainer, config, due)


def _from_random_weights(adapter: Adapter, setting: Setting) -> Result:
    """A run of no steps, whose checkpoint has what it would begin with: the weights of its seed."""
    trainer = adapter.trainer()
    title = f"{trainer.name}: initial weights of a run's seed"
    config = named(setting, dataclasses.replace(setting.config, init_from=None, steps=0), title.replace(":", ""))
    run(trainer, config)
    found = read_weights(config.run_dir).arrays
    due = adapter.initialize(config.model, config.seed)
    wrong = [name for name in due if not np.allclose(found[name], due[name], rtol=1e-5, atol=0.0)]
    return Result("trainer", title, float(len(wrong)), limits.NONE, wrong[0] if wrong else f"{len(due)} tensors")


def _continued_elsewhere(trainer: Trainer, setting: Setting, due: Outcome) -> Iterator[Result]:
    """From a checkpoint of a run that was interrupted, named by its path, to the end in a folder of its own."""
    title = f"{trainer.name}, continued in another folder"
    begun = named(setting, setting.config, f"{title}: begun")
    run(trainer, begun, interrupt_at=INTERRUPTED_AT)
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
        config = named(setting, config, f"{adapter.name}, in bfloat16")
        run(adapter.trainer(), config)
        rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")
        for what, split, of in (("training", "train", batch), ("evaluation", "val", validation)):
            logged = next(row["loss"] for row in rows if row["split"] == split)
            due, other = (
                adapter.make(setting.weights, dtype).loss_and_grads(of, 1)[0] for dtype in ("bfloat16", "float32")
            )
            title = f"{adapter.name}, in bfloat16: the first loss of {what}"
            where = f"{logged:.8f} where {due:.8f} is due; in float32 it would be {other:.8f}"
            yield Result("trainer", title, abs(logged - due) / due, limits.BFLOAT16_LOSS, where)


def _without_validation(trainers: list[Trainer], setting: Setting) -> Iterator[Result]:
    """The training losses choose the best checkpoint; so many epochs are rounded up to a whole step. Sequences are
    shorter than the context, and in the order of the text."""
    data = dataclasses.replace(setting.config.data, validation_fraction=0.0)
    config = dataclasses.replace(setting.config, data=data, epochs=1.2, checkpoint_interval=4, log_interval=1)
    config = dataclasses.replace(_in_order(config), best_checkpoint_interval=2, keep_checkpoints=9)
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
    model = dataclasses.replace(MODEL, dropout=0.2)
    config = dataclasses.replace(setting.config, model=model, steps=4, log_interval=1)
    rare = named(setting, dataclasses.replace(config, eval_interval=4, sample_interval=0), f"{trainer.name}, rare")
    often = dataclasses.replace(config, eval_interval=1, sample_interval=1, checkpoint_interval=2, keep_checkpoints=4)
    often = named(setting, often, f"{trainer.name}, often")
    run(trainer, rare)
    run(trainer, often, interrupt_at=2)
    run(trainer, dataclasses.replace(often, resume=NEWEST))
    watched, unwatched = (read_metrics(Path(c.run_dir) / "metrics.jsonl") for c in (often, rare))

    title = f"{trainer.name}, dropout"
    training = [[row for row in rows if row["split"] == "train"] for rows in (watched, unwatched)]
    measured, _, where = differing_steps(*training)
    if not measured:
        measured, where = first_difference(*training)
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
    measured, where = first_difference(evaluated, due)
    yield Result("trainer", f"{title}: evaluations leave it out", measured, limits.CURVE, where)

    # Without updates, and on a text whose windows are all the same, nothing but the masks tells steps apart.
    tokens = setting.folder / "one-window"
    tokens.mkdir(exist_ok=True)
    np.resize(setting.text.val[: MODEL.block_size], 20 * MODEL.block_size).astype("<u2").tofile(tokens / "train.bin")
    still = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokens=str(tokens), validation_fraction=0.0),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=0.0),
        sample_interval=0,
    )
    still = named(setting, still, f"{trainer.name}, still")
    run(trainer, still)
    losses = [row["loss"] for row in read_metrics(Path(still.run_dir) / "metrics.jsonl")]
    equal = config.steps - len(set(losses))
    where = f"losses {', '.join(f'{loss:.6f}' for loss in losses)} of one batch and the same weights"
    yield Result("trainer", f"{title}: every step has masks of its own", float(equal), limits.NONE, where)


def _model(setting: Setting, arrays: Arrays) -> GPT2:
    weights = dataclasses.replace(setting.weights, arrays={n: a.astype(np.float64) for n, a in arrays.items()})
    return build(weights).to(setting.config.device)
