"""The losses before a step, on the device, and the highest that the next may have.

Shape: W the number of losses (`gpt2_core.spikes.WINDOW`), oldest first.
"""

import math

import torch
from torch import Tensor

from gpt2_core.spikes import LEAST, NO_LOSS, SMALLEST_DEVIATION


def loss_limit(losses_W: Tensor, deviations: float) -> Tensor:
    """The loss beyond which a step's is a spike: so many standard deviations above the mean; infinite while there are
    too few losses."""
    known_W = losses_W != NO_LOSS
    count = known_W.sum()
    mean = torch.where(known_W, losses_W, 0.0).sum() / count
    squares_W = torch.where(known_W, losses_W - mean, 0.0).square()
    deviation = (squares_W.sum() / count).sqrt().clamp(min=SMALLEST_DEVIATION)
    return torch.where(count >= LEAST, mean + deviations * deviation, math.inf)


def with_loss(losses_W: Tensor, loss: Tensor) -> Tensor:
    """The window after one more step; a loss that isn't finite leaves it as it is."""
    return torch.where(torch.isfinite(loss), torch.cat([losses_W[1:], loss[None]]), losses_W)
