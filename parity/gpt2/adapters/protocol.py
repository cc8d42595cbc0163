"""What checks ask of an adapter of a GPT-2: what all have, and the capabilities that one may lack.

Arrays go in and come out as numpy, weights and gradients by canonical name and in canonical shape. An adapter that
lacks a capability lacks its methods, and what would need them is skipped, with the reason.

Shapes: B batch, T time, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np

from gpt2_core.config import ModelConfig, TrainConfig
from gpt2_core.runs.folder import RunFolder
from gpt2_core.weights import Weights
from parity.engine import adapter
from parity.engine.adapter import Capability

NAMES = ("JAX", "PyTorch")
"""Of the candidate and the reference that are compared when nobody says otherwise (`parity.gpt2.adapters.both`)."""

Arrays = dict[str, np.ndarray]
# The dropout masks of a forward pass in order of computation: for each site one array or, of attention weights, one for
# each block of queries. 1 is kept, 0 dropped, -1 not to be seen.
Sites = list[list[np.ndarray]]


class Adapter(adapter.Adapter, Protocol):
    """One implementation of GPT-2 that holds one set of weights, and computes in float64, float32 or bfloat16 (of which
    the parameters stay float32)."""

    weights: Weights
    config: ModelConfig
    device: str
    """Where it computes: "cpu" or "cuda"."""

    def make(self, weights: Weights, dtype: str = "float64") -> Self: ...

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits (B, T, V), in float32 at least."""


# --- capabilities; the methods are those of JaxAdapter and TorchAdapter, which document them

LOGITS = Capability("logits", ("logits",))
PLAIN_LOGITS = Capability("logits compiled as captured values are", ("plain_logits",))
INTERMEDIATES = Capability("intermediate values", ("intermediates",))
DTYPES = Capability("dtypes of intermediate values to see", ("dtypes",))
GRADIENTS = Capability("gradients", ("loss_and_grads",))
ACTIVATION_GRADIENTS = Capability("gradients of intermediate values", ("activation_grads",))
ROUND_TRIP = Capability("conversion back to canonical weights", ("round_trip",))
INITIALIZATION = Capability("initialisation of its own", ("initialize",))
PADDING = Capability("rows that pad the vocabulary", ("padding_values",))
NARROW_INITIALIZATION = Capability("initialisation in float32", ("changed_by_precision",))
BORN_ON_MESH = Capability("initialisation on a mesh", ("changed_by_mesh", "devices", "devices_of"))
TRAINING = Capability("training steps", ("train", "steps"))
RATES = Capability("learning rates to ask for", ("learning_rate",))
DECAY = Capability("decay to see", ("applied_decay",))
MESH = Capability("mesh of devices", ("devices", "devices_of", "check_mesh", "evaluate"))
DROPOUT = Capability("dropout masks that can be seen", ("dropout_masks",))
SEEDS = Capability("seeds of dropout by process", ("dropout_seeds",))
GIVEN_MASKS = Capability("dropout whose masks can be given", ("train_with_masks", "intermediates_with_masks"))
DROPPED_INTERMEDIATES = Capability("intermediate values of training to see", ("dropped_intermediates",))
GENERATION = Capability("generation", ("generate", "sample"))
DECODING = Capability("KV cache", ("decoded_logits", "decoded_intermediates"))
STOPPING = Capability("generation that stops at the end of a text", ("generate_until",))
ATTENTION = Capability("attention that can be called by itself", ("attended", "attention_blocks"))
NORM_KERNEL = Capability("norm kernel that can be called by itself", ("normed_by_kernel",))
LOSS = Capability("loss that can be called by itself", ("cross_entropy", "loss_chunks", "vocabulary_rows"))
FEW_SLOTS = Capability("KV cache that grows", ("few_slots", "min_slots"))
SPIKES = Capability("limits of the loss to see", ("loss_limits",))
PROGRAM = Capability("traced program", ("program",))
STEP_PROGRAM = Capability("traced train step on a mesh", ("step_program", "devices"))
TRAINER = Capability("trainer", ("trainer",))
PROCESSES = Capability("trainer by several processes", ("trainer_of_processes",))


# --- training


class State(NamedTuple):
    """What a training step changes, by canonical name."""

    params: Arrays
    first_moments: Arrays
    second_moments: Arrays


class Step(NamedTuple):
    """One training step: what it reports, and the state that it leads to, to be read before the next step."""

    loss: float
    grad_norm: float
    state: Callable[[], State]
    embedding: Callable[[], np.ndarray]
    """The token embedding alone."""


class Trained(NamedTuple):
    """What a few training steps gave: a row a step, and the state they led to."""

    losses: np.ndarray
    grad_norms: np.ndarray
    params: Arrays
    first_moments: Arrays
    second_moments: Arrays
    watched: list[np.ndarray]
    """The token embedding after each step."""


class TrainerState(NamedTuple):
    """What a checkpoint holds: the number of updates, and arrays by canonical name."""

    updates: int
    params: Arrays
    first_moments: Arrays
    second_moments: Arrays


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A training command's `train`, and how its checkpoints are read."""

    name: str
    train: Callable[..., RunFolder]
    state: Callable[[Path, TrainConfig], TrainerState]


class Masks(NamedTuple):
    """The dropout masks of some training steps."""

    steps: list[list[Sites]]
    """Of each step, of each part of its batch."""
    scale_error: float | None
    """How far what is made of a kept element is from the element over 1 - rate, relatively; None if it isn't seen."""


def copied(arrays: Arrays) -> Arrays:
    """The next step writes into the memory of the state that it is given."""
    return {name: array.copy() for name, array in arrays.items()}


def trained(steps: Iterator[Step]) -> Trained:
    rows, watched = [], []
    for step in steps:
        rows.append((step.loss, step.grad_norm))
        watched.append(step.embedding())
    return Trained(*np.array(rows).T, *step.state(), watched)


def joined(blocks: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The mask (B, H, T, T) of attention weights, of one for each block of queries, over the keys up to its end."""
    whole, rows = np.zeros(shape, bool), 0
    for mask in blocks:
        whole[..., rows : rows + mask.shape[-2], : mask.shape[-1]] = mask
        rows += mask.shape[-2]
    return whole
