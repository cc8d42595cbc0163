"""Mistakes of the learning rate."""

import dataclasses

import gpt2_jax.train
from parity.gpt2.faults.fault import fault


@fault(
    "learning rate one step early",
    check="schedule",
    place="JAX",
    seam=(gpt2_jax.train, "learning_rate"),
)
def learning_rate_one_step_early(rate):
    """the schedule read after the counter went up"""

    return lambda step, steps, config: rate(step + 1, steps, config)


@fault(
    "learning rate one step late",
    check="schedule",
    place="JAX",
    seam=(gpt2_jax.train, "learning_rate"),
)
def learning_rate_one_step_late(rate):
    """scheduler.step() before optimizer.step(), or a counter that starts at -1"""

    return lambda step, steps, config: rate(max(0, step - 1), steps, config)


@fault(
    "warmup from zero",
    check="schedule",
    place="JAX",
    seam=(gpt2_jax.train, "learning_rate"),
)
def warmup_from_zero(rate):
    """optax.linear_schedule(0, peak): the first update does nothing"""

    def wrong(step, steps, config):
        if step < config.warmup_steps:
            return config.learning_rate * step / config.warmup_steps
        return rate(step, steps, config)

    return wrong


@fault(
    "cosine to zero",
    check="schedule",
    place="JAX",
    seam=(gpt2_jax.train, "learning_rate"),
)
def cosine_to_zero(rate):
    """optax.cosine_decay_schedule's default alpha"""

    return lambda step, steps, config: rate(step, steps, dataclasses.replace(config, final_fraction=0.0))


@fault(
    "a schedule that starts again",
    check="loss_curve",
    place="step 5: parameter of",
    seam=(gpt2_jax.train, "learning_rate"),
)
def a_schedule_that_starts_again(rate):
    """an optimizer made again in the middle of a run, whose counter begins at zero"""

    return lambda step, steps, config: rate(step if step < 5 else step - 5, steps, config)
