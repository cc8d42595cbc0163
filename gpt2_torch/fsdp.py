"""A model split over processes (FSDP2, `fully_shard`): each holds its part of every parameter, gradient and moment.

What is gathered or split here is gathered or split by all processes at the same time.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from gpt2_torch.model import GPT2


def split(model: GPT2) -> None:
    """Split a model, in place, over all processes: block by block, so that its forward pass gathers one at a time."""
    for block in model.h:
        fully_shard(block)
    fully_shard(model)


def is_split(model: nn.Module) -> bool:
    return isinstance(getattr(model, "_orig_mod", model), FSDPModule)  # _orig_mod: what torch.compile has wrapped


def whole(value: Tensor) -> Tensor:
    """A tensor that may be split, gathered."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def on_every_process(value: Tensor, like: Tensor) -> Tensor:
    """A number that all processes have, as operations with the split tensor `like` take it."""
    if not isinstance(like, DTensor):
        return value
    return DTensor.from_local(value, like.device_mesh, [Replicate()] * like.device_mesh.ndim)


def gathered(tree: Any, keep: bool) -> Any:
    """The nested dicts and lists of a state with every tensor gathered, one at a time and then on the CPU; with `keep`
    false, of the processes that only take part, without any."""
    if isinstance(tree, Mapping):
        return {name: gathered(value, keep) for name, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value, keep) for value in tree]
    if isinstance(tree, Tensor):
        found = whole(tree.detach())
        return found.cpu() if keep else None
    return tree


def split_like(tree: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimizer's state with its moments split as the optimizer's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        value = value.to(parameter.device, parameter.dtype)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)

    state = {
        number: {name: placed(value, parameters[number]) for name, value in values.items()}
        for number, values in tree["state"].items()
    }
    return tree | {"state": state}
