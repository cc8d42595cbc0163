"""What a run of a trainer left behind (log, checkpoints, samples), compared with what is due."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2_core.config import TrainConfig
from gpt2_core.runs.folder import RunFolder, read_metadata, read_metrics
from parity.engine.results import Result, relative_norm
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import Trainer, TrainerState
from parity.gpt2.plain_loop import Outcome

# In the order of dependence: the rate follows from the step alone, the loss from all rates before.
_WORDS = {"lr": "learning rate", "loss": "loss", "grad_norm": "gradient norm"}


def compare(title: str, trainer: Trainer, config: TrainConfig, due: Outcome) -> Iterator[Result]:
    """What the run of `config` left, against what is due."""
    folder = RunFolder(Path(config.run_dir))
    rows = read_metrics(folder.metrics)
    yield Result("trainer", f"{title}: logged steps", *differing_steps(rows, due.rows))
    measured, where = first_difference(rows, due.rows)
    yield Result("trainer", f"{title}: figures", measured, limits.CURVE, where)
    yield Result("trainer", f"{title}: tokens a step", *wrong_tokens(rows, config))

    # By what their metadata says, which a name must agree with.
    kept = [read_metadata(folder.checkpoints / str(step))["step"] for step in folder.steps()]
    best = folder.best_step()
    differ = (kept, best) != (due.kept, due.best)
    where = f"kept {kept}, best {best}" + (f", where {due.kept} and {due.best} are due" if differ else "")
    yield Result("trainer", f"{title}: checkpoints", float(differ), limits.NONE, where)
    states = {step: trainer.state(folder.checkpoints / str(step), config) for step in folder.steps()}
    measured, where = first_difference_of_states(states, due.states)
    yield Result("trainer", f"{title}: states", measured, limits.STEP, where)

    samples = {int(path.stem): path.read_bytes() for path in folder.samples.glob("*.txt")}
    wrong = [step for step in sorted({*samples, *due.samples}) if samples.get(step) != due.samples.get(step)]
    where = f"{len(due.samples)} of them"
    if wrong:
        where = f"after {wrong[0]} updates: {samples.get(wrong[0])} where {due.samples.get(wrong[0])} is due"
    yield Result("trainer", f"{title}: samples", float(len(wrong)), limits.NONE, where)


def differing_steps(rows: list[dict], due: list[dict]) -> tuple[float, float, str]:
    """Rows that are missing, too many or out of order."""
    found, expected = ([_in_words(row) for row in of] for of in (rows, due))
    if found == expected:
        return 0.0, 0.0, f"{len(found)} rows"
    paired = list(itertools.zip_longest(found, expected, fillvalue="nothing"))
    first = next((a, b) for a, b in paired if a != b)
    return float(sum(a != b for a, b in paired)), 0.0, f"{first[0]} where {first[1]} is due"


def first_difference(rows: list[dict], due: list[dict]) -> tuple[float, str]:
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


def first_difference_of_states(found: dict[int, TrainerState], due: dict[int, TrainerState]) -> tuple[float, str]:
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


def wrong_tokens(rows: list[dict], config: TrainConfig) -> tuple[float, float, str]:
    """Tokens a second times seconds a step, as a share of what rounding them in the log may change."""
    shares = [0.0]
    for row in rows:
        if row["split"] == "train":
            rate, seconds = row["tokens_per_second"], row["step_seconds"]
            tokens = config.batch_size * (config.sequence_length or config.model.block_size)
            shares.append(abs(rate * seconds - tokens) / (0.051 * seconds + 0.51e-6 * rate))
    return max(shares), 1.0, f"{config.batch_size} x {config.sequence_length or config.model.block_size}"


def _in_words(row: dict) -> str:
    return f"step {row['step']}" if row["split"] == "train" else f"validation after {row['step']} updates"
