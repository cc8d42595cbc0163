"""What a spike of the training loss is. `gpt2_jax.spikes` and `gpt2_torch.spikes` compute it on the device."""

# A loss is a spike where it is more than so many standard deviations above the mean of up to WINDOW losses before it,
# of which there must be LEAST. Of independent, normally distributed losses one in a billion is 6 deviations above.
WINDOW, LEAST, DEVIATIONS = 50, 20, 6.0

# The place of a loss that isn't there yet, where the losses of a window are an array: a mean cross entropy is never
# below 0.
NO_LOSS = -1.0

# Losses that are equal to the last digit have no deviation to measure by.
SMALLEST_DEVIATION = 1e-12


def window(losses: list[float]) -> list[float]:
    """These losses at the end of a window, oldest first."""
    return [NO_LOSS] * (WINDOW - len(losses)) + losses


def known(window: list[float]) -> list[float]:
    """The losses of a window."""
    return [loss for loss in window if loss != NO_LOSS]
