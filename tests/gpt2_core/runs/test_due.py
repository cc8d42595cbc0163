import dataclasses

import pytest

from gpt2_core.config import TrainConfig
from gpt2_core.runs.due import Due, due_after, is_logged

CONFIG = TrainConfig(steps=12, eval_interval=3, checkpoint_interval=6, sample_interval=4, log_interval=5)


def updates_with(task: str, config: TrainConfig = CONFIG) -> list[int]:
    return [n for n in range(config.steps + 1) if getattr(due_after(n, config), task)]


@pytest.mark.parametrize(
    ("task", "updates"),
    [("evaluate", [0, 3, 6, 9, 12]), ("sample", [4, 8, 12]), ("save", [6, 12]), ("stop", [12])],
)
def test_tasks_are_due_at_their_intervals(task, updates):
    assert updates_with(task) == updates


def test_every_checkpoint_is_evaluated_whatever_the_intervals():
    config = dataclasses.replace(CONFIG, eval_interval=100, checkpoint_interval=5)
    assert updates_with("save", config) == [5, 10, 12]
    assert updates_with("evaluate", config) == [0, 5, 10, 12]


def test_the_last_step_is_saved_between_intervals_too():
    config = dataclasses.replace(CONFIG, steps=7)
    assert due_after(7, config) == Due(evaluate=True, sample=False, save=True, stop=True)


def test_a_reached_target_ends_the_run_with_an_evaluation_and_a_checkpoint():
    assert due_after(5, CONFIG) == Due(evaluate=False, sample=False, save=False, stop=False)
    assert due_after(5, CONFIG, reached_target=True) == Due(evaluate=True, sample=False, save=True, stop=True)


def test_a_sample_interval_of_zero_writes_none():
    assert updates_with("sample", dataclasses.replace(CONFIG, sample_interval=0)) == []


def test_a_run_of_no_steps_saves_the_weights_that_it_begins_with():
    assert due_after(0, dataclasses.replace(CONFIG, steps=0)) == Due(evaluate=True, sample=False, save=True, stop=True)
    assert due_after(0, CONFIG) == Due(evaluate=True, sample=False, save=False, stop=False)


def test_the_first_and_the_last_step_are_logged():
    assert [step for step in range(12) if is_logged(step, CONFIG)] == [0, 5, 10, 11]
