"""Generation with the reference: every token recomputes the whole context, which is slow and simple.

Shapes: B batch, V vocabulary. The sampler's definition is in gpt2_core.sampling.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gpt2_core.sampling import Sampling, fit_context
from gpt2_torch.model import GPT2


def sample(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """Next tokens (B,) from the last position's logits and one uniform number for each sequence."""
    if sampling.greedy:
        return logits_BV.argmax(dim=-1)
    sorted_BV, order_BV = torch.sort(logits_BV / sampling.temperature, dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        sorted_BV = sorted_BV[:, : sampling.top_k]
    probabilities_BV = torch.softmax(sorted_BV, dim=-1)
    if sampling.top_p is not None:
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        probabilities_BV = probabilities_BV * (before_BV < sampling.top_p)
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    threshold_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    # The first token whose cumulative probability exceeds the threshold; rounding must not move past the last kept.
    kept_B = (probabilities_BV > 0).sum(dim=-1)
    chosen_B = torch.minimum((cumulative_BV <= threshold_B1).sum(dim=-1), kept_B - 1)
    return order_BV.gather(-1, chosen_B[:, None])[:, 0]


@torch.no_grad()
def generate(
    model: GPT2, prompts: Sequence[Sequence[int]], uniforms: np.ndarray, sampling: Sampling
) -> Iterator[list[int]]:
    """Yield the next token of each prompt, as many times as `uniforms` (B, tokens) has columns."""
    model.eval()
    parameter = next(model.parameters())
    block_size = model.config.block_size
    contexts = [fit_context(list(prompt), block_size, growing=False) for prompt in prompts]
    for uniforms_B in torch.from_numpy(uniforms).T:
        rows = [model(torch.tensor([ids], device=parameter.device))[0, -1] for ids in contexts]
        logits_BV = torch.stack(rows)
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        tokens = sample(logits_BV, uniforms_B.to(logits_BV), sampling).tolist()
        contexts = [
            fit_context([*ids, token], block_size, growing=True) for ids, token in zip(contexts, tokens, strict=True)
        ]
        yield tokens
