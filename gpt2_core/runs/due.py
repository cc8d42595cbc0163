"""What a trainer has to do after each step: log, evaluate, save a checkpoint, write a sample, stop."""

from typing import NamedTuple

from gpt2_core.config import TrainConfig
from gpt2_core.runs.folder import RunPlan, read_metrics


class Due(NamedTuple):
    """The tasks due once so many updates are made, in the order in which both trainers do them."""

    evaluate: bool
    sample: bool
    save: bool
    stop: bool


def due_after(updates: int, config: TrainConfig, *, reached_target: bool = False) -> Due:
    """What is due after `updates` updates; 0 is the start of a new run.

    The last update, which a reached target loss makes the last too, is always saved; what is saved is evaluated.
    """
    stop = updates == config.steps or reached_target
    save = stop or _is_multiple(updates, config.checkpoint_interval)
    evaluate = save or updates == 0 or _is_multiple(updates, config.eval_interval)
    return Due(evaluate, _is_multiple(updates, config.sample_interval), save, stop)


def due_at_start(plan: RunPlan) -> Due:
    """What is due before the first step of a run: of a new one what is due after 0 updates, of a continued one what it
    gave up when it was told to stop."""
    due = due_after(plan.step, plan.config)
    if plan.checkpoint is None:
        return due
    if plan.checkpoint.parent != plan.folder.checkpoints:
        return Due(evaluate=False, sample=False, save=False, stop=due.stop)
    evaluated = any((row["split"], row["step"]) == ("val", plan.step) for row in read_metrics(plan.folder.metrics))
    sampled = plan.folder.sample(plan.step).exists()
    return Due(due.evaluate and not evaluated, due.sample and not sampled, save=False, stop=due.stop)


def is_due_as_best(updates: int, saved: int, is_best: bool, config: TrainConfig) -> bool:
    """Whether the state after `updates` updates is saved because its loss is the best. `saved` is the last that was."""
    interval = config.best_checkpoint_interval
    return is_best and interval > 0 and updates - saved >= interval


def is_logged(step: int, config: TrainConfig) -> bool:
    """Whether the loss of `step`, counted from 0, is logged: every `log_interval`-th, and the last."""
    return step % config.log_interval == 0 or step + 1 == config.steps


def _is_multiple(updates: int, interval: int) -> bool:
    """Whether an interval has passed; an interval of 0 never does."""
    return updates > 0 and interval > 0 and updates % interval == 0
