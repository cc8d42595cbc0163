"""The three schedules agree with each other and see a slip of one step at any of the edges."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

import gpt2_torch.train
from gpt2_core.schedule import learning_rate
from parity.gpt2 import limits
from parity.gpt2.adapters import both
from parity.gpt2.checks import schedule
from parity.gpt2.faults import case_of

pytestmark = pytest.mark.usefixtures("x64")


def test_the_three_schedules_agree():
    for shape in schedule._SCHEDULES:
        closed, *others = (rates_of(*shape) for rates_of in schedule._EXPECTATIONS.values())
        for other in others:
            assert np.max(np.abs(closed - other)) <= limits.SCHEDULE * schedule._PEAK, shape


def first_failure():
    case = case_of()
    return next(result for result in schedule.check(case, *both(case.weights)) if not result.passed)


# What is wrong, and the first step of the first schedule at which it shows.
SLIPS = {
    "one step early": (lambda step, steps, c: learning_rate(step + 1, steps, c), "first at step 0"),
    "warmup one step short": (
        lambda step, steps, c: learning_rate(
            step, steps, dataclasses.replace(c, warmup_steps=max(0, c.warmup_steps - 1))
        ),
        "first at step 0",
    ),
    "the end one step late": (lambda step, steps, c: learning_rate(step, steps + 1, c), "first at step 4"),
    "no warmup": (
        lambda step, steps, c: learning_rate(step, steps, dataclasses.replace(c, warmup_steps=0)),
        "first at step 0",
    ),
    "half the final rate": (
        lambda step, steps, c: learning_rate(step, steps, dataclasses.replace(c, final_fraction=c.final_fraction / 2)),
        "first at step 4",
    ),
    "linear decay": (
        lambda step, steps, c: (
            learning_rate(step, steps, c)
            if step <= c.warmup_steps
            else c.learning_rate
            * (1 - (1 - c.final_fraction) * (step - c.warmup_steps) / max(1, steps - c.warmup_steps))
        ),
        "first at step 4",
    ),
    "not a number": (lambda step, steps, c: float("nan"), "first at step 0"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named_by_its_schedule_and_step(slip):
    wrong, where = SLIPS[slip]
    with mock.patch.object(gpt2_torch.train, "learning_rate", wrong):
        found = first_failure()
    assert found.case.startswith("PyTorch's trainer")
    assert where in found.where and "warmup 3 of 10 steps" in found.where


def test_a_difference_at_one_step_of_one_schedule_is_seen():
    def wrong(step, steps, config):
        # The last step of the longest run.
        return learning_rate(step, steps, config) * (1 + 1e-12 * (step == 999))

    with mock.patch.object(gpt2_torch.train, "learning_rate", wrong):
        found = first_failure()
    assert "warmup 100 of 1000" in found.where and "first at step 999" in found.where
