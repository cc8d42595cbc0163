"""Looks at PyTorch's forward passes from outside: values, and the dropout masks that are drawn or given."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from parity.gpt2.adapters.protocol import Sites, joined


class Recorder(TorchFunctionMode):
    """Shows `keep` the values of the reference's forward passes, from outside: by hooks on its modules, and by its
    calls of attention."""

    def __init__(self, model: torch.nn.Module, keep: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._model, self._keep, self._handles, self._attentions = model, keep, [], 0

    def __enter__(self) -> None:
        def output(name):
            return lambda _, __, out: self._keep(name, out)

        def input(name):
            return lambda _, args: self._keep(name, args[0])

        modules = dict(self._model.named_modules())
        places = [(modules["drop"], "embeddings", True), (modules["ln_f"], "ln_f", False)]
        for number, block in enumerate(self._model.h):
            h = f"h.{number}."
            places += [
                (block.ln_1, h + "ln_1", False),
                (block.attn.c_proj, h + "attn.out", True),
                (block.attn.c_proj, h + "attn.c_proj", False),
                (block.ln_2, h + "residual_1", True),
                (block.ln_2, h + "ln_2", False),
                (block.mlp.c_fc, h + "mlp.c_fc", False),
                (block.mlp.c_proj, h + "mlp.activation", True),
                (block.mlp.c_proj, h + "mlp.c_proj", False),
                (block, h + "residual_2", False),
            ]
            if hasattr(block.mlp, "c_gate"):
                places.append((block.mlp.c_gate, h + "mlp.c_gate", False))
        for module, name, before in places:
            hook = (
                module.register_forward_pre_hook(input(name)) if before else module.register_forward_hook(output(name))
            )
            self._handles.append(hook)
        super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            for name, value in zip("qkv", args, strict=False):
                self._keep(f"h.{self._attentions % len(self._model.h)}.attn.{name}", value)
            self._attentions += 1
        return function(*args, **(kwargs or {}))


class GivenMasks(TorchFunctionMode):
    """Dropout with given masks: the sites of each part of the batch, in order of computation."""

    def __init__(self, parts: Sequence[Sites]) -> None:
        super().__init__()
        self._sites = iter([site for part in parts for site in part])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            p, training = _dropout_options(args, kwargs)
            return _dropped(args[0], next(self._sites)[0], p) if training and p > 0 else args[0]
        if function is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            q, k, v = args
            scores, bias = q @ k.mT / math.sqrt(q.shape[-1]), kwargs.get("attn_mask")
            if bias is None:
                bias = torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype, device=q.device).triu(1)
            scores = scores + bias
            mask = joined(next(self._sites), scores.shape)
            return _dropped(scores.softmax(dim=-1), mask, kwargs["dropout_p"]) @ v
        return function(*args, **kwargs)


class DrawnMasks(TorchFunctionMode):
    """Sees the masks that dropout draws, in order of computation, and whether what is kept is scaled by them."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[np.ndarray] = []
        self.scale_error = 0.0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            p, training = _dropout_options(args, kwargs)
            if training and p > 0:
                return self._seen(lambda x: function(x, p, training), torch.ones_like(args[0]), p, args[0])
        if function is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            q, k, v = args
            # With the identity as values attention gives back its weights, dropped or not.
            identity = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:-1], -1)
            weights = function(q, k, identity, **kwargs | {"dropout_p": 0.0})
            return self._seen(lambda v: function(q, k, v, **kwargs), identity, kwargs["dropout_p"], v, weights)
        return function(*args, **kwargs)

    def _seen(self, drop, probe: torch.Tensor, p: float, x: torch.Tensor, undropped: torch.Tensor | None = None):
        """drop(x), after the same draw has been applied to what shows the mask."""
        undropped = probe if undropped is None else undropped
        with torch.random.fork_rng(), torch.no_grad():
            shown = drop(probe)
        mask = torch.where(undropped != 0, (shown != 0).to(torch.int8), -1)
        expected = undropped * (mask == 1) / (1.0 - p)
        self.scale_error = max(self.scale_error, ((shown - expected).abs() / expected.abs().max()).max().item())
        self.masks.append(_to_numpy(mask))
        return drop(x)


def _dropout_options(args, kwargs) -> tuple[float, bool]:
    return args[1:3] if len(args) > 2 else (kwargs["p"], kwargs["training"])


def _dropped(x: torch.Tensor, mask: np.ndarray, p: float) -> torch.Tensor:
    return x * torch.from_numpy(mask.copy()).to(x.device) / (1.0 - p)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
