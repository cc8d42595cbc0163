"""The rows of a task's data set: of the Hugging Face Hub, or of a local file in the same format."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from gpt2_core.data.hub import load_from_hub
from gpt2_core.errors import UserError
from gpt2_core.evaluation.tasks import Dataset, Row
from gpt2_core.parsing import json_object, read_text


def read_rows(
    task: str,
    dataset: Dataset,
    data_dir: str | None,
    limit: int | None,
    *,
    option: str = "--tasks",
    folder_option: str = "--data_dir",
) -> list[Row]:
    """The first `limit` rows of a data set, in its order (None: all of them), with the fields that the task reads.

    `data_dir` is a folder with a file TASK.jsonl or, of the data set that several tasks read, DATASET.jsonl. Raises
    UserError, in terms of the options that named task and folder, if the data set can't be read, has no rows, or isn't
    what it should be.
    """
    if data_dir is None:
        rows = _of_hub(f"{option} {task}", f"{folder_option} FOLDER", dataset)
    else:
        rows = _of_file(_local_file(task, dataset, Path(data_dir), folder_option))
    checked = [_checked(row, where, dataset) for where, row in itertools.islice(rows, limit)]
    if not checked:
        raise UserError(f"{option} {task}: its data set has no rows; give one with an example at least")
    return checked


def _local_file(task: str, dataset: Dataset, folder: Path, option: str) -> Path:
    names = [f"{task}.jsonl", f"{dataset.name.rpartition('/')[2]}.jsonl"]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            f"{option} {folder}: no {' or '.join(dict.fromkeys(names))} there, which the task {task} reads: one JSON "
            f"object a line, with {', '.join(dataset.fields)}, like {dataset.name} of the Hugging Face Hub"
        )
    return found


def _of_file(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, json_object(line, where)


def _of_hub(typed: str, instead: str, dataset: Dataset) -> Iterator[tuple[str, Row]]:
    advice = f"check the network, or give the data set's files: {instead}"
    rows = load_from_hub(typed, advice, dataset.name, dataset.config, dataset.split, streaming=False)
    for number, row in enumerate(rows, start=1):
        yield f"{dataset.name}, row {number}", row


def _checked(row: Row, where: str, dataset: Dataset) -> Row:
    for name, field in dataset.fields.items():
        if name not in row or not field.is_valid(row[name]):
            raise UserError(f"{where}: expected {field.expected} in the field {name}")
    return {name: row[name] for name in dataset.fields}
