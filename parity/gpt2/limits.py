"""The limit of every case, with its reason. None is loosened to pass: a difference has a cause.

Unless it says otherwise a limit is of a relative difference in float64, which rounds at 1e-16.
"""

# --- equal
BYTES = 0.0  # a conversion moves numbers, it never computes
TOKENS = 0.0  # in float64 no two logits are close enough for rounding to choose
NONE = 0.0  # counts of what must not be

# --- one pass
# Sums over a few hundred terms and some tens of layers stay below 1e-14. A wrong formula shows at 1e-9 and above, a
# float32 somewhere at 1e-7.
FORWARD = 1e-12
# Gradients sum over every token of the batch and pass through every layer twice; measured 1e-14.
GRADIENTS = 1e-10
# One function by itself and its gradient: sums over some tens of terms.
FUNCTION = 1e-12

# The same in float32, of numbers around 30: measured 2e-6.
FLOAT32_FUNCTION = 1e-5

# --- training
# The root of a small second moment, and the division by it, cost a few units in the last place at every step.
STEP = 1e-10
# Of the peak: a ratio of two weights is known to 2e-16, and the peak is 0.5. PyTorch's cosine is computed from step to
# step; measured 4e-15 after 1,000 of them.
SCHEDULE = 1e-14
# Losses: measured 2e-15 after 20 steps and 3e-12 after 1,500; the optax clipping formula alone would give 1e-8. A sum
# over devices is a sum in another order, and with the same dropout masks a curve is a curve: no more.
CURVE = 1e-11
CURVE_LONG = 1e-9  # from LONG steps on
LONG = 1000


def curve(steps: int) -> float:
    """Of the losses of so many steps."""
    return CURVE if steps < LONG else CURVE_LONG


# A bfloat16 has 8 bits of mantissa: each part that is sent is rounded by at most 2^-9 of itself, and the sum once more.
BFLOAT16_EXCHANGE = 2.0**-8
# A loss in bfloat16, by a program that computes other batches at once: a sum in float32 is rounded at 1e-7; the loss
# itself is off by some 1e-4.
BFLOAT16_LOSS = 2e-6
# Of attention weights that are kept by dropout: computed twice they differ in their last digits.
DROPOUT_SCALE = 1e-12

# --- chance
# -log10 of the probability that right programs look at least this unlikely in all tests of a case together: of the
# suite's statistical cases fewer than one run in ten thousand fails one.
SURPRISE = 6.0

# --- precision
# The candidate's error over the reference's: what orders of summation and places of rounding may make of it. A lost
# digit is a factor of ten, the fast variance of layer norm up to 29.
ERROR_RATIO = 1.25
# A loss against the cross-entropy of the same program's logits, which leaves out what happened before them: float32
# rounds the sum at 1e-7. Rounded to bfloat16 once more, each logit is off by up to 4e-3.
LOSS_OF_LOGITS = 1e-6
# A user's implementation against the error of the reference in the same dtype. Wider than ERROR_RATIO, which is held
# against several sequences and knows what chance does.
EXTERNAL_RATIO = 1.5
# A float32 pass rounds at 1e-7, which tens of layers bring to 1e-6 or 1e-5; another model is off by tenths.
FLOAT32_LOGITS = 1e-4
