"""A trained GPT-2 as Python sees it: text continued, and the logits of token ids. `gpt2_jax.load` and `gpt2_torch.load`
make one."""

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np

from gpt2_core.config import check_seed
from gpt2_core.data.tokenizer import stream_text
from gpt2_core.errors import UserError
from gpt2_core.sampling import Sampling, uniforms
from gpt2_core.weights import Weights
from gpt2_core.weights.tokenizer import choose_tokenizer

T = TypeVar("T")

PRECISIONS = ("auto", "float32", "bfloat16", "float64")


class LanguageModel(ABC):
    """Weights that compute. Everything wrong that a caller can give is a UserError.

    `config` is the architecture, `tokenizer` turns text into token ids and back, `source` says where the weights are
    from.
    """

    def __init__(self, weights: Weights, tokenizer: str | None, precision: str) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision}: expected one of {', '.join(PRECISIONS)}")
        self.config, self.source = weights.config, weights.source
        self.tokenizer = choose_tokenizer(weights, tokenizer)

    def generate(self, prompt: str = "", **options: Any) -> str:
        """The prompt and its continuation; the options are those of `stream_ids`."""
        return prompt + "".join(self.stream(prompt, **options))

    def stream(self, prompt: str = "", **options: Any) -> Iterator[str]:
        """The continuation of a prompt, in pieces as they come; the options are those of `stream_ids`."""
        return stream_text(self.tokenizer, self.stream_ids(prompt, **options))

    def stream_ids(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        seed: int = 0,
        sample: int = 0,
        stop_at_end_of_text: bool = False,
    ) -> Iterator[int]:
        """The token ids that continue a prompt (of "": a document from its start), as they come.

        A function of its arguments: `sample` numbers the continuations of one seed, and both frameworks draw the same.
        """
        if max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {max_new_tokens}: must be 1 or more")
        check_seed(seed)
        sampling = Sampling(temperature, top_k, top_p, greedy)
        end_of_text = self.tokenizer.end_of_text if stop_at_end_of_text else None
        rows = self._continue(
            [self.encode(prompt)], uniforms(seed, sample, max_new_tokens)[None], sampling, end_of_text
        )
        tokens = (row[0] for row in _within(self._computing, rows))
        return itertools.takewhile(lambda token: token != end_of_text, tokens)

    def encode(self, prompt: str) -> list[int]:
        """The token ids that a continuation of the prompt begins from: of "" the end of a text before it."""
        try:
            ids: list[int] = self.tokenizer.encode(prompt).tolist()
        except UnicodeEncodeError as error:
            raise UserError("--prompt: not UTF-8 text") from error
        return ids or [self.tokenizer.end_of_text]

    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """The logits (T, V) that follow each of the token ids (T,); (B, T, V) for (B, T)."""
        given = np.asarray(ids)
        tokens_BT = given[None] if given.ndim == 1 else given
        if tokens_BT.ndim != 2 or not tokens_BT.size or not np.issubdtype(tokens_BT.dtype, np.integer):
            raise UserError(f"ids: expected token ids (T,) or (B, T), not {given.dtype} of shape {given.shape}")
        if not 0 <= tokens_BT.min() <= tokens_BT.max() < self.config.vocab_size:
            wrong = next(int(i) for i in tokens_BT.flat if not 0 <= i < self.config.vocab_size)
            raise UserError(f"ids: there is a {wrong}, and this model knows 0 to {self.config.vocab_size - 1}")
        if tokens_BT.shape[1] > self.config.block_size:
            raise UserError(
                f"ids: {tokens_BT.shape[1]} are longer than this model's context of {self.config.block_size}; give the "
                "last of them"
            )
        with self._computing():
            logits_BTV = self._logits(tokens_BT)
        return logits_BTV[0] if given.ndim == 1 else logits_BTV

    @abstractmethod
    def _continue(
        self, prompts: list[list[int]], uniforms: np.ndarray, sampling: Sampling, end_of_text: int | None
    ) -> Iterator[list[int]]:
        """The next token of each prompt, as many times as `uniforms` has columns, or until the end of each text."""

    @abstractmethod
    def _logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Logits (B, T, V), in float32 (in float64, float64)."""

    def _computing(self) -> AbstractContextManager[Any]:
        """What the framework is told while it computes with this model, and not while its caller does something."""
        return contextlib.nullcontext()


def _within(context: Callable[[], AbstractContextManager[Any]], items: Iterator[T]) -> Iterator[T]:
    """The items, each computed inside the context: a `with` around the loop would last while the caller has an item."""
    while True:
        with context():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
