"""The JAX model as a model of EleutherAI's lm-evaluation-harness, by the name gpt2_jax.

Its answers are those of the harness's own model `hf` on the same weights: the same tokens, cut in the same places.
"""

from collections.abc import Sequence

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from gpt2_convert import read_weights
from gpt2_core.data.tokenizer import Tokenizer
from gpt2_core.errors import UserError, reason
from gpt2_core.evaluation.scoring import Request, Score, encode_pair, rolling_requests, score
from gpt2_core.sampling import Sampling, uniforms
from gpt2_core.weights.tokenizer import choose_tokenizer
from gpt2_evaluate.backends import jax_program
from gpt2_jax.generate import Generator
from gpt2_jax.runtime import configure
from gpt2_jax.score import scorer

MAX_GEN_TOKS = 256
"""Tokens generated for a request that doesn't say how many, as by the model `hf`."""


@register_model("gpt2_jax")
class GPT2JaxLM(LM):
    """`weights` as convert.py reads them; `checkpoint`, `tokenizer`, `mesh`, `precision` and `batch_size` as those of
    evaluate.py. The harness gives every model a `device`, which is PyTorch's: JAX computes on its accelerators, or on
    the CPU with JAX_PLATFORMS=cpu."""

    def __init__(
        self,
        weights: str,
        *,
        checkpoint: str = "latest",
        tokenizer: str | None = None,
        mesh: int | str | None = None,
        precision: str = "auto",
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: gpt2_jax takes a number of sequences, like 32")
        try:
            configure(precision, mesh)
        except RuntimeError as error:  # a script has used JAX before
            raise UserError(
                f"mesh={mesh}: JAX has been used in this process already, with other devices ({reason(error)}); make "
                "the model before anything else computes with JAX"
            ) from error
        opened = read_weights(weights, str(checkpoint))
        self._tokenizer = _WithMarkers(choose_tokenizer(opened, tokenizer))
        self._batch_size, self._block_size = int(batch_size), opened.config.block_size
        self._program, self._params = jax_program(opened, mesh=mesh, precision=precision, batch_size=self._batch_size)
        self._generator = Generator(self._program.definition)

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.name

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked = [encode_pair(self._tokenizer, *request.args) for request in requests]
        if any(len(pair.continuation) > self._block_size for pair in asked):
            raise UserError(f"a continuation is longer than the model's block size {self._block_size}; use other tasks")
        answers = [(answer.log_prob, answer.is_greedy) for answer in self._scores(asked, disable_tqdm)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [
            list(rolling_requests(self._tokenizer.encode(text).tolist(), self._tokenizer.end_of_text, self._block_size))
            for (text,) in (request.args for request in requests)
        ]
        scores = iter(self._scores([window for of_text in windows for window in of_text], disable_tqdm))
        totals = [sum(next(scores).log_prob for _ in of_text) for of_text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, of several requests at once where they are generated in the same way."""
        texts: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        with tqdm(total=len(requests), desc="gpt2_jax generates", disable=disable_tqdm) as bar:
            for group in groups.values():
                for begin in range(0, len(group), self._batch_size):
                    numbers = group[begin : begin + self._batch_size]
                    made = self._generate([requests[i].args[0] for i in numbers], requests[numbers[0]].args[1], numbers)
                    for number, text in zip(numbers, made, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(numbers))
        return texts

    def _scores(self, asked: Sequence[Request], disable_tqdm: bool) -> list[Score]:
        with tqdm(total=len(asked), desc="gpt2_jax scores", disable=disable_tqdm) as bar:
            return score(
                asked,
                scorer(self._program, self._params),
                block_size=self._block_size,
                batch_size=self._batch_size,
                advance=bar.update,
            )

    def _generate(self, contexts: Sequence[str], asked: dict, numbers: Sequence[int]) -> list[str]:
        """What follows each context, up to the first text to stop at; `numbers` seed what is sampled."""
        options = dict(normalize_gen_kwargs(asked, MAX_GEN_TOKS))
        end_of_text = self._tokenizer.end_of_text
        until = handle_stop_sequences(options.pop("until"), eos=self._tokenizer.decode([end_of_text]))
        count, sampling = options.pop("max_gen_toks"), _sampling(options)
        room = self._block_size - count
        if room < 1:
            raise UserError(
                f"a task generates {count} tokens, and the model's block size is {self._block_size}; use "
                f"--gen_kwargs max_gen_toks={self._block_size // 2}"
            )
        prompts = [self._tokenizer.encode(context).tolist()[-room:] or [end_of_text] for context in contexts]
        drawn = np.stack([uniforms(0, number, count) for number in numbers])
        continued: list[list[int]] = [[] for _ in prompts]
        with jax.set_mesh(self._program.mesh):
            for tokens in self._generator(self._params, prompts, drawn, sampling, end_of_text):
                for ids, token in zip(continued, tokens, strict=True):
                    ids.append(token)
                if all(_is_at_end(self._tokenizer.decode(ids), until) for ids in continued):
                    break
        return [postprocess_generated_text(self._tokenizer.decode(ids), until, None) for ids in continued]


def _is_at_end(text: str, until: Sequence[str]) -> bool:
    return any(stop in text for stop in until if stop)


def _sampling(options: dict) -> Sampling:
    """How tokens are chosen; raises UserError for what this model can't do."""
    if not options.pop("do_sample"):
        options.pop("temperature", None)
        sampling = Sampling(greedy=True)
    else:
        sampling = Sampling(options.pop("temperature"), options.pop("top_k", None), options.pop("top_p", None))
    if options:
        raise UserError(f"generation with {', '.join(options)}: gpt2_jax can't do this; use another task or --model hf")
    return sampling


class _WithMarkers(Tokenizer):
    """A tokenizer that reads <|endoftext|> in a text as the token, as Hugging Face's do."""

    def __init__(self, plain: Tokenizer) -> None:
        self._plain = plain
        self.name, self.vocab_size, self.end_of_text = plain.name, plain.vocab_size, plain.end_of_text

    def encode(self, text: str) -> np.ndarray:
        first, *others = text.split(self.decode([self.end_of_text]))
        parts = [self._plain.encode(first)]
        for part in others:
            parts += [np.array([self.end_of_text], np.int32), self._plain.encode(part)]
        return np.concatenate(parts)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._plain.decode_bytes(ids)
