"""What a training run must come to, by a plain loop that shares no line with the trainers' own.

The model is the PyTorch reference's, which `forward` and `gradients` compare, and the order of the windows is
`gpt2_core.data.batches`', which `wrong_batches` holds to the text. Learning rates, clipping, decay, evaluation,
sampling and what is due after which step are written here once more.
"""

import collections
import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gpt2_core.config import TrainConfig
from gpt2_core.data.batches import Batch, TrainingBatches
from gpt2_core.data.tokenizer import get_tokenizer
from gpt2_core.data.tokens import Source
from gpt2_core.weights import Weights
from gpt2_torch.model import GPT2
from gpt2_torch.weights import build
from parity.gpt2.adapters.protocol import TrainerState
from parity.gpt2.adapters.torch_adapter import state_of
from parity.gpt2.checks.schedule import closed_form

# Logged training losses whose mean judges a checkpoint without validation, and whether the target is reached.
_RECENT = 10


class Text(NamedTuple):
    """Token ids: the training split's shards, and a validation split of one."""

    train: tuple[np.ndarray, ...]
    val: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run leaves behind."""

    rows: list[dict]
    """Of the log, in its order: split, step and figures."""
    kept: list[int]
    """Steps of the checkpoints that are there at the end."""
    best: int
    """The one that `--checkpoint best` names."""
    states: dict[int, TrainerState]
    """By the number of updates: of all checkpoints ever saved, or of those that are there."""
    samples: dict[int, bytes]


def windows(shards: tuple[np.ndarray, ...], length: int) -> list[np.ndarray]:
    """Every window of T + 1 tokens, in order: each begins with the last token of the one before, none leaves its
    shard."""
    return [
        shard[start : start + length + 1].astype(np.int64)
        for shard in shards
        for start in range(0, len(shard) - length, length)
    ]


def run(config: TrainConfig, weights: Weights, text: Text) -> Outcome:
    """Train from `weights` on `text` as `config` says, in float64, without dropout and with one sum over each batch,
    where PyTorch's trainer would compute."""
    model = build(weights.astype(np.float64)).to(config.device)
    optimizer = _adamw(model, config)
    length, validates = config.sequence_length or config.model.block_size, config.data.validation_fraction > 0
    steps = config.steps
    if config.epochs is not None:
        steps = math.ceil(config.epochs * len(windows(text.train, length)) / config.batch_size)
    batches = training_batches(text, config, config.seed)
    rows, states, samples, ranks = [], {}, {}, []

    def evaluate_after(updates: int) -> None:
        if validates:
            rows.append({"split": "val", "step": updates, "loss": evaluation(model, config, text)})

    evaluate_after(0)
    for step in range(steps):
        peak, warmup, final = (
            getattr(config.optimizer, n) for n in ("learning_rate", "warmup_steps", "final_fraction")
        )
        rate = peak * closed_form(step, warmup, steps, final)
        loss, norm = _update(model, optimizer, batches[step], rate, config)
        if step % config.log_interval == 0 or step == steps - 1:
            rows.append({"split": "train", "step": step, "loss": loss, "lr": rate, "grad_norm": norm})
        updates = step + 1
        over = updates == steps or _is_down_to(config.target_loss, rows)
        saves = over or updates % config.checkpoint_interval == 0
        if saves or updates % config.eval_interval == 0:
            evaluate_after(updates)
        newest = rows[-1]["split"], rows[-1]["step"]
        if newest == (("val", updates) if validates else ("train", step)):
            ranks.append(rows[-1]["loss"] if validates else np.mean(_training_losses(rows)[-_RECENT:]))
            since = updates - max(states, default=0)
            is_best = ranks[-1] == min(ranks) and ranks.index(ranks[-1]) == len(ranks) - 1
            saves |= is_best and 0 < config.best_checkpoint_interval <= since
        if config.sample_interval and updates % config.sample_interval == 0:
            samples[updates] = _sample(model, config, updates)
        if saves:
            states[updates] = state_of(model, optimizer, updates)
        if over:
            break
    kept, best = kept_and_best(rows, list(states), config)
    return Outcome(rows, kept, best, states, samples)


def kept_and_best(rows: list[dict], saved: list[int], config: TrainConfig) -> tuple[list[int], int]:
    """Of the checkpoints that a run saved: those that are left at its end, and the best of them."""
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "val"}
    if not losses:
        losses = {updates: np.mean(_training_losses(rows, updates)[-_RECENT:]) for updates in saved}
    best = min(saved, key=losses.__getitem__)
    return sorted({best, *sorted(saved)[-config.keep_checkpoints :]}), best


def training_batches(text: Text, config: TrainConfig, seed: int, process: int = 0, processes: int = 1):
    return TrainingBatches(
        (Source(text.train, ("",) * len(text.train)),),
        sequence_length=config.sequence_length or config.model.block_size,
        batch_size=config.batch_size,
        seed=seed,
        order=config.data.order,
        rows=range(process, config.batch_size, processes),
    )


def wrong_batches(text: Text, config: TrainConfig) -> tuple[int, list[str]]:
    """The sequences looked at, and what is wrong with them: all of two epochs, and one step more."""
    in_order = [w.tobytes() for w in windows(text.train, config.sequence_length or config.model.block_size)]
    due, size = collections.Counter(in_order), len(in_order)
    steps = math.ceil(2 * size / config.batch_size) + 1

    def stream(seed: int) -> list[bytes]:
        batches = training_batches(text, config, seed)
        return [row.tobytes() for step in range(steps) for row in _whole_sequences(batches[step])]

    wrong, found = [], stream(config.seed)
    epochs = [found[:size], found[size : 2 * size]]
    for number, epoch in enumerate(epochs):
        repeated, missing = collections.Counter(epoch) - due, due - collections.Counter(epoch)
        if repeated or missing:
            wrong.append(f"epoch {number}: {repeated.total()} sequences too many, {missing.total()} windows left out")
    if config.data.order == "sequential":
        wrong += ["an epoch isn't in the order of the text"] if epochs != [in_order, in_order] else []
    else:
        if in_order in epochs or epochs[0] == epochs[1]:
            wrong.append("an epoch in the order of the text, or two in one order")
        if found == stream(config.seed + 1):
            wrong.append("two seeds give one order")
    whole = training_batches(text, config, config.seed)
    halves = [training_batches(text, config, config.seed, process, 2) for process in range(2)]
    for step in range(steps):
        together = [row.tobytes() for half in halves for row in _whole_sequences(half[step])]
        if collections.Counter(together) != collections.Counter(r.tobytes() for r in _whole_sequences(whole[step])):
            wrong.append(f"step {step}: two processes don't see the sequences that one would")
            break
    return len(found), wrong


def _whole_sequences(batch) -> np.ndarray:
    """Inputs and the last target, (B, T + 1), int64; -1 all over where targets aren't the inputs that follow."""
    inputs, targets = (x.astype(np.int64) for x in batch)
    shifted = (inputs[:, 1:] == targets[:, :-1]).all()
    return np.concatenate([inputs, targets[:, -1:]], axis=1) if shifted else np.full_like(inputs, -1)


@torch.no_grad()
def evaluation(model: GPT2, config: TrainConfig, text: Text) -> float:
    """Mean loss over every target of the windows that an evaluation reads: evenly spread over the split."""
    model.eval()
    chosen = _validation_windows(config, text)
    logits_BTV = model(torch.from_numpy(chosen[:, :-1].copy()).to(config.device)).cpu().numpy()
    logits_BTV -= logits_BTV.max(axis=-1, keepdims=True)
    of_targets_BT1 = np.take_along_axis(logits_BTV, chosen[:, 1:, None], axis=-1)
    return float(np.mean(np.log(np.exp(logits_BTV).sum(axis=-1)) - of_targets_BT1[..., 0]))


def validation_batch(config: TrainConfig, text: Text) -> Batch:
    """The sequences that an evaluation reads, all at once."""
    chosen = _validation_windows(config, text)
    return Batch(np.ascontiguousarray(chosen[:, :-1]), np.ascontiguousarray(chosen[:, 1:]))


def _validation_windows(config: TrainConfig, text: Text) -> np.ndarray:
    every = windows((text.val,), config.sequence_length or config.model.block_size)
    count = min(config.eval_sequences, len(every))
    return np.stack([every[number * len(every) // count] for number in range(count)])


def _adamw(model: GPT2, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    settings = config.optimizer
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


def _update(
    model: GPT2, optimizer: torch.optim.AdamW, batch: Batch, rate: float, config: TrainConfig
) -> tuple[float, float]:
    """One update; the mean loss of the batch, and the norm of its gradient."""
    inputs_BT, targets_BT = (torch.from_numpy(x).to(config.device, torch.long) for x in batch)
    loss = F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())
    optimizer.zero_grad()
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
    if (clip_norm := config.optimizer.clip_norm) > 0:
        for grad in grads:
            grad *= min(1.0, clip_norm / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.item(), norm


def _training_losses(rows: list[dict], before: float = math.inf) -> list[float]:
    return [row["loss"] for row in rows if row["split"] == "train" and row["step"] < before]


def _is_down_to(target: float | None, rows: list[dict]) -> bool:
    losses = _training_losses(rows)
    return target is not None and len(losses) >= _RECENT and np.mean(losses[-_RECENT:]) <= target


@torch.no_grad()
def _sample(model: GPT2, config: TrainConfig, updates: int) -> bytes:
    """A sample's file: text that follows an end-of-text, drawn token by token by inverting the cumulative
    distribution."""
    tokenizer = get_tokenizer(config.data.tokenizer)
    ids = [tokenizer.end_of_text]
    for uniform in np.random.default_rng([config.seed, updates]).random(config.sample_tokens):
        logits_V = model(torch.tensor([ids], device=config.device))[0, -1].cpu().numpy()
        order = np.argsort(-logits_V, kind="stable")
        cumulative = np.cumsum(np.exp(logits_V[order] - logits_V.max()))
        ids.append(int(order[np.argmax(cumulative > uniform * cumulative[-1])]))
    return (tokenizer.decode(ids[1:]) + "\n").encode()
