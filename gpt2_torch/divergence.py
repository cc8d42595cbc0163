"""Where a step's forward pass stops being finite."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_not_finite(model: nn.Module, parts: Iterable[tuple[Tensor, Tensor]]) -> str | None:
    """The name of the first module whose output isn't finite, without dropout; None if all are.

    `parts` are (inputs, targets) of a batch.
    """
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, given: object, output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name or "loss")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    was_training = model.training
    model.eval()
    try:
        for inputs_BT, targets_BT in parts:
            model(inputs_BT, targets_BT)
            if found:
                return found[0]
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return None
