"""Weights as a PyTorch model that generates text and gives logits, on one device."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from gpt2_core.language_model import LanguageModel
from gpt2_core.sampling import Sampling
from gpt2_core.weights import Weights
from gpt2_torch.generate import generate
from gpt2_torch.runtime import pick_device, resolve_precision
from gpt2_torch.weights import build


class TorchModel(LanguageModel):
    """`module` is the `torch.nn.Module`."""

    def __init__(
        self, weights: Weights, *, tokenizer: str | None = None, precision: str = "auto", device: str = "auto"
    ) -> None:
        super().__init__(weights, tokenizer, precision)
        self._device = pick_device(device)
        self._precision = resolve_precision(precision, self._device)
        dtype = np.float64 if self._precision == "float64" else np.float32
        self.module = build(weights.astype(dtype)).to(self._device)

    def _continue(
        self, prompts: list[list[int]], uniforms: np.ndarray, sampling: Sampling, end_of_text: int | None
    ) -> Iterator[list[int]]:
        return generate(self.module, prompts, uniforms, sampling)  # which is asked for no token after the last

    @torch.no_grad()
    def _logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        logits_BTV = self.module(torch.from_numpy(tokens_BT.astype(np.int64)).to(self._device))
        array_BTV: np.ndarray = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).cpu().numpy()
        return array_BTV

    def _computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bfloat16")
