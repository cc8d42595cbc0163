"""Mistakes of the loss: which targets count, and what a mean is over."""

import math

import jax.numpy as jnp

import gpt2_jax.loss
import gpt2_jax.model
import gpt2_jax.train_step
import gpt2_torch.train
from gpt2_core.config import IGNORE_INDEX
from parity.gpt2.faults.fault import fault


@fault(
    "loss over targets shifted twice",
    check="gradients",
    place="ln_f",
    seam=(gpt2_jax.model.GPT2, "loss"),
)
def loss_over_targets_shifted_twice(loss):
    """the data is shifted, and the model's loss shifts again (Hugging Face's does)"""

    def wrong(self, tokens, targets, **options):
        again = jnp.concatenate([targets[:, 1:], jnp.full_like(targets[:, :1], IGNORE_INDEX)], axis=1)
        return loss(self, tokens, again, **options)

    return wrong


@fault(
    "mean of means",
    check="gradients",
    place="accumulation 4",
    part="accumulation 4",
    seam=(gpt2_torch.train, "accumulate_gradients"),
)
def mean_of_means(accumulate):
    """each accumulated part averaged over its own targets; transformers mended it in October 2024
    (github.com/huggingface/transformers/pull/34191)"""

    def wrong(model, inputs, targets, *, accumulation=1, autocast=None):
        total = 0.0
        for i, t in zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True):
            loss = model(i, t) / (t != IGNORE_INDEX).sum() / accumulation
            loss.backward()
            total = total + loss.detach()
        return total

    return wrong


@fault(
    "padded vocabulary inside the softmax",
    check="gradients",
    place="ln_f",
    seam=(gpt2_jax.model, "summed_cross_entropy"),
)
def padded_vocabulary_inside_the_softmax(loss):
    """rows that pad the vocabulary take part in the normalisation"""

    return lambda x, w, t, v: loss(x, w, t, len(w))


@fault(
    "a mean over every target",
    check="gradients",
    place="ln_f: relative difference 2.8e-01, 0.71875 times as large in JAX as in PyTorch",
    seam=(gpt2_jax.train_step, "IGNORE_INDEX"),
)
def a_mean_over_every_target(ignored):
    """the train step divides by the size of the batch, padding too: every gradient is too small by one factor"""

    return -math.inf


@fault(
    "last tokens of a sequence left out of the loss",
    check="sizes",
    place="chunks with a remainder",
    seam=(gpt2_jax.loss, "_chunks"),
)
def last_tokens_of_a_sequence_left_out_of_the_loss(chunks):
    """a length that the chunks don't divide, cut down to what they do"""

    def wrong(x, targets, rows):
        targets = jnp.asarray(targets)
        C = gpt2_jax.loss._chunk_length(*targets.shape, rows * x.dtype.itemsize)
        whole = targets.shape[1] // C * C
        return chunks(x, targets.at[:, whole:].set(IGNORE_INDEX), rows)

    return wrong
