"""The dropout masks that the JAX train step draws."""

import functools
import itertools
from collections.abc import Iterable

import jax
import numpy as np

import gpt2_jax.train_step
from gpt2_core.config import TrainConfig
from gpt2_core.data.batches import Batch
from gpt2_jax.capture import tapping
from gpt2_jax.definition import Definition
from parity.gpt2.adapters.jax_capture import PLAIN
from parity.gpt2.adapters.protocol import Sites


def dropout_parts(config: TrainConfig, step: int, batch: Batch) -> list[tuple]:
    """The dropout keys, inputs and targets of each part that a train step computes at once."""
    parts = [x.reshape(config.accumulation, -1, x.shape[-1]) for x in batch]
    keys_AB = gpt2_jax.train_step.dropout_keys(config.seed, step, parts[0].shape[:2])
    return list(zip(keys_AB, *parts, strict=True))


def drawn_masks(definition: Definition):
    """(params, keys_B, inputs_BT, targets_BT) -> the masks that a training pass draws, in order of computation."""

    # What is compiled is integer arithmetic, the same bits at any level of optimisation.
    @functools.partial(jax.jit, compiler_options=PLAIN)
    def masks(params, keys_B, inputs_BT, targets_BT):
        found: list[jax.Array] = []

        def keep(name, value):
            if name.endswith("dropout_mask"):
                found.append(value)
            return value

        with tapping(keep):
            definition.merge(params).loss(inputs_BT, targets_BT, dropout_keys_B=keys_B)
        return found

    return masks


def by_site(masks: Iterable[np.ndarray]) -> Sites:
    """Masks in order of computation by site: those of attention weights, (B, H, queries, keys), follow one another."""
    groups = itertools.groupby(masks, key=lambda mask: mask.ndim == 4)
    return [site for weights, found in groups for site in ([list(found)] if weights else [[mask] for mask in found])]
