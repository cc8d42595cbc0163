"""The probabilities that the reference gives to tokens.

Shapes: B sequences, T time, V vocabulary.
"""

import contextlib

import torch
from torch import Tensor, nn

from gpt2_core.config import IGNORE_INDEX
from gpt2_core.data.batches import Batch
from gpt2_core.evaluation.scoring import ScoreBatch, TokenScores


def scorer(model: nn.Module, device: torch.device, autocast: contextlib.AbstractContextManager) -> ScoreBatch:
    """What scores a batch with a model in evaluation mode, a sequence at a time: logits exist for one."""

    @torch.no_grad()
    def score_batch(batch: Batch) -> TokenScores:
        inputs_BT, targets_BT = (torch.from_numpy(part).to(device, torch.long) for part in batch)
        rows = []
        with autocast:
            for inputs_T, targets_T in zip(inputs_BT, targets_BT, strict=True):
                rows.append(_of_sequence(model(inputs_T[None])[0], targets_T))
        return TokenScores(*(torch.stack(part).cpu().numpy() for part in zip(*rows, strict=True)))

    return score_batch


def _of_sequence(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each target, in float32 at least, and whether it is the likeliest token."""
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    ids_T = targets_T.where(targets_T != IGNORE_INDEX, 0)
    target_T = logits_TV.gather(-1, ids_T[:, None])[:, 0]
    return target_T - logits_TV.logsumexp(dim=-1), logits_TV.argmax(dim=-1) == targets_T
