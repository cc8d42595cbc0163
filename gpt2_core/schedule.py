"""The learning rate as a pure function of the step, computed on the host and passed to both train steps."""

import math

from gpt2_core.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of the update that follows batch `step` (counted from 0) in a run of `steps` updates.

    Linear warmup over `warmup_steps` updates, reaching the peak at the last of them, then a cosine down to
    `final_fraction` of the peak at the end of the run (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983;
    the shape GPT-3 used, Brown et al. 2020, appendix B).
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    final = peak * config.final_fraction
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
