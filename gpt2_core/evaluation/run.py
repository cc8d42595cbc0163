"""From the names of tasks to their results."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt2_core.config import IGNORE_INDEX, DataConfig, ModelConfig, TrainConfig
from gpt2_core.data.batches import Batch, Windows, evaluation_batches
from gpt2_core.data.tokenizer import Tokenizer
from gpt2_core.data.tokens import open_tokens
from gpt2_core.errors import UserError
from gpt2_core.evaluation.published import PUBLISHED, preset_of
from gpt2_core.evaluation.rows import read_rows
from gpt2_core.evaluation.scoring import ScoreBatch, TokenScores, perplexity, score
from gpt2_core.evaluation.tasks import GROUPS, TASKS, Figure, Row

TOKENS = "validation tokens in windows of the block size, each token after what its window has before it"

Advance = Callable[[int], None]
Begin = Callable[[str, int], Advance]
"""Told a task and how many sequences it has; gives what is told how many more are done."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of OpenAI's GPT-2 of the same size, and where it is published."""

    model: str
    value: float
    source: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A figure of a model, how it is defined, and what is published for it."""

    task: str
    variant: str
    figure: str
    meaning: str
    value: float
    examples: int
    published: Published | None


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What is evaluated: a model behind `score_batch`, which takes `batch_size` sequences at once."""

    config: ModelConfig
    tokenizer: Tokenizer
    score_batch: ScoreBatch
    batch_size: int


def chosen_tasks(names: str, *, option: str = "--tasks", paths: bool = True) -> list[str]:
    """The tasks that an option names, with commas between them, and `paths` of tokens; a group becomes its tasks."""
    chosen: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name not in TASKS and name not in GROUPS and not (paths and name and Path(name).exists()):
            known, or_path = ", ".join([*GROUPS, *TASKS]), " or a path of tokens" if paths else ""
            raise UserError(f"{option} {name}: no such task; use one or more of {known}{or_path}")
        chosen += GROUPS.get(name, (name,))
    return list(dict.fromkeys(chosen))


def evaluate_task(model: Evaluated, name: str, rows: Sequence[Row], begin: Begin) -> list[Result]:
    """The results of one of TASKS on these rows."""
    task = TASKS[name]
    requests = [task.requests(row, model.tokenizer, model.config.block_size) for row in rows]
    asked = [request for of_row in requests for request in of_row]
    scores = iter(
        score(
            asked,
            model.score_batch,
            block_size=model.config.block_size,
            batch_size=model.batch_size,
            advance=begin(name, len(asked)),
        )
    )
    by_row = [[next(scores) for _ in of_row] for of_row in requests]
    return [_result(model, name, task.variant, f, len(rows)) for f in task.figures(rows, by_row, requests)]


def evaluate_tokens(model: Evaluated, path: str, limit: int | None, begin: Begin) -> list[Result]:
    """The mean loss of the validation split of a token folder or file, over `limit` windows spread evenly over it, or
    over all of them."""
    config, tokenizer = model.config, model.tokenizer.name
    try:
        tokens = open_tokens(TrainConfig(model=config, data=DataConfig(tokens=path, tokenizer=tokenizer)))
    except UserError as error:
        raise UserError(f"--tasks {path}: {error}") from error
    windows = sum(len(Windows(source, config.block_size)) for source in tokens.val)
    sequences = windows if limit is None else min(limit, windows)
    advance, losses, count = begin(path, sequences), [], 0
    for batch in evaluation_batches(
        tokens.val, sequence_length=config.block_size, batch_size=model.batch_size, sequences=sequences
    ):
        counts_BT = batch.targets != IGNORE_INDEX
        losses.append(-np.asarray(model.score_batch(batch).log_probs)[counts_BT].sum(dtype=np.float64))
        count += int(counts_BT.sum())
        advance(int(counts_BT.any(axis=-1).sum()))
    total = math.fsum(losses)
    figures = [
        Figure("loss", total / count, "nats per token"),
        Figure("perplexity", perplexity(-total, count), "per token"),
    ]
    return [_result(model, path, TOKENS, figure, sequences) for figure in figures]


Rows = dict[str, list[Row]]
"""The rows of each task."""


def open_tasks(config: TrainConfig) -> Rows:
    """What a run is evaluated on beside its validation split; raises UserError for what can't be read."""
    names = [] if config.eval_tasks is None else chosen_tasks(config.eval_tasks, option="--eval_tasks", paths=False)
    read = functools.partial(read_rows, option="--eval_tasks", folder_option="--eval_data_dir")
    return {name: read(name, TASKS[name].dataset, config.eval_data_dir, config.eval_examples) for name in names}


def figures_of(model: Evaluated, rows: Rows, check: Callable[[], None]) -> dict[str, float]:
    """The figures of these tasks by TASK/FIGURE; `check` is called before each batch, and may raise to give up."""

    def score_batch(batch: Batch) -> TokenScores:
        check()
        return model.score_batch(batch)

    checked = dataclasses.replace(model, score_batch=score_batch)
    results = [result for name in rows for result in evaluate_task(checked, name, rows[name], _untold)]
    return {f"{result.task}/{result.figure}": result.value for result in results}


def _untold(task: str, total: int) -> Advance:
    return lambda count: None


def _result(model: Evaluated, task: str, variant: str, figure: Figure, examples: int) -> Result:
    published = _published(model.config, task, figure.name)
    return Result(task, variant, figure.name, figure.meaning, figure.value, examples, published)


def _published(config: ModelConfig, task: str, figure: str) -> Published | None:
    found, preset = PUBLISHED.get((task, figure)), preset_of(config)
    if found is None or preset not in found.figures:
        return None
    return Published(preset, found.figures[preset], f"{found.source}{f', {found.differs}' if found.differs else ''}")
