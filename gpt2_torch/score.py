"""The probabilities that the reference gives to tokens.

Shapes: B sequences, C of them at a time, T time, V vocabulary.
"""

import contextlib

import torch
from torch import Tensor, nn

from gpt2_core.config import IGNORE_INDEX
from gpt2_core.data.batches import Batch
from gpt2_core.evaluation.scoring import ScoreBatch, TokenScores

# Of the sequences that are computed at a time, in float32.
LOGITS_BYTES = 512 << 20


def scorer(model: nn.Module, device: torch.device, autocast: contextlib.AbstractContextManager) -> ScoreBatch:
    """What scores a batch with a model in evaluation mode, as many sequences at a time as LOGITS_BYTES allow."""

    @torch.no_grad()
    def score_batch(batch: Batch) -> TokenScores:
        inputs_BT, targets_BT = (torch.from_numpy(part).to(device, torch.long) for part in batch)
        size = max(1, LOGITS_BYTES // (4 * model.config.vocab_size * inputs_BT.shape[1]))
        with autocast:
            parts = [
                _of_logits(model(inputs_CT), targets_CT)
                for inputs_CT, targets_CT in zip(inputs_BT.split(size), targets_BT.split(size), strict=True)
            ]
        return TokenScores(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))

    return score_batch


def _of_logits(logits_CTV: Tensor, targets_CT: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each target, in float32 at least, and whether it is the likeliest token."""
    logits_CTV = logits_CTV.to(torch.promote_types(logits_CTV.dtype, torch.float32))
    ids_CT = targets_CT.where(targets_CT != IGNORE_INDEX, 0)
    target_CT = logits_CTV.gather(-1, ids_CT[..., None])[..., 0]
    return target_CT - logits_CTV.logsumexp(dim=-1), logits_CTV.argmax(dim=-1) == targets_CT
