"""Weights as a JAX model that generates text and gives logits, on one device."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from gpt2_core.errors import UserError
from gpt2_core.language_model import LanguageModel
from gpt2_core.sampling import Sampling
from gpt2_core.weights import Weights
from gpt2_jax.definition import Params, define
from gpt2_jax.generate import Generator
from gpt2_jax.model import Execution
from gpt2_jax.runtime import matmul_precision, resolve_precision
from gpt2_jax.weights import from_canonical


class JaxModel(LanguageModel):
    """`params` are its parameters, `definition` the functions of them."""

    def __init__(self, weights: Weights, *, tokenizer: str | None = None, precision: str = "auto") -> None:
        super().__init__(weights, tokenizer, precision)
        self._precision = resolve_precision(precision)
        if self._precision == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
            raise UserError(
                'precision float64: JAX has it after jax.config.update("jax_enable_x64", True), for the whole process; '
                "call that first"
            )
        execution = Execution(self._precision)
        self.definition = define(weights.config, execution)
        self.params = jax.device_put(from_canonical(weights, execution.param_dtype.name))
        self._generator = Generator(self.definition)

    def _continue(
        self, prompts: list[list[int]], uniforms: np.ndarray, sampling: Sampling, end_of_text: int | None
    ) -> Iterator[list[int]]:
        return self._generator(self.params, prompts, uniforms, sampling, end_of_text)

    def _logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        return np.asarray(self._forward(self.params, tokens_BT.astype(np.int32)))

    @functools.cached_property
    def _forward(self) -> Callable[[Params, np.ndarray], jax.Array]:
        return jax.jit(lambda params, tokens_BT: self.definition.merge(params)(tokens_BT))

    def _computing(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = jax.default_matmul_precision(matmul_precision(self._precision))
        return context
