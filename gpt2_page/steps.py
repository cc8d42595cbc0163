"""Two models continue one prompt, step by step: the token that each chose, how probable each found it, and by how much
their probabilities differ. Pairs are in the order of the models.

Shapes: V vocabulary.
"""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpt2_core.config.checks import LARGEST, in_short
from gpt2_core.data.tokenizer import Tokenizer
from gpt2_core.errors import UserError
from gpt2_core.language_model import LanguageModel
from gpt2_core.sampling import fit_context

# How many of each model's likeliest tokens a step keeps.
LIKELIEST = 5
# A visitor's prompt is cut to its last characters before it is encoded, which takes time and memory by its length.
MOST_CHARACTERS = 20_000
MOST_NEW_TOKENS = 200


@dataclasses.dataclass(frozen=True)
class Token:
    """A token and its probability in each model, given each model's own context."""

    id: int
    label: str
    probabilities: tuple[float, float]

    @property
    def difference(self) -> float:
        return abs(self.probabilities[0] - self.probabilities[1])


@dataclasses.dataclass(frozen=True)
class Step:
    """What the two models chose at one step.

    `texts` are the pieces that the choices add to each text; a piece is empty while a character isn't complete.
    `largest` is the largest difference of a probability over the whole vocabulary; None if the texts before this step
    differ, because the models then didn't compute the same.
    """

    number: int
    chosen: tuple[Token, Token]
    texts: tuple[str, str]
    largest: float | None
    likeliest: tuple[Token, ...]

    @property
    def is_same(self) -> bool:
        return self.largest is not None and self.chosen[0].id == self.chosen[1].id


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What the steps say together: how many were compared, where the texts part (None: nowhere), and the step with the
    largest difference of a probability (None: there is no step yet)."""

    compared: int
    parted: Step | None
    worst: Step | None


def agreement(steps: Sequence[Step]) -> Agreement:
    compared = [step for step in steps if step.largest is not None]
    parted = next((step for step in compared if not step.is_same), None)
    return Agreement(len(compared), parted, max(compared, key=lambda step: step.largest, default=None))


def cut(prompt: str, model: LanguageModel) -> tuple[str, list[int], str | None]:
    """The prompt, at most MOST_CHARACTERS of it; the ids of it that the model sees first; and what was cut, as a
    sentence."""
    kept = prompt[-MOST_CHARACTERS:]
    ids = model.encode(kept)
    seen = fit_context(ids, model.config.block_size, growing=False)
    if len(seen) < len(ids):
        return kept, seen, f"The prompt is longer than this model's context: only its last {len(seen)} tokens are used."
    if len(kept) < len(prompt):
        return kept, seen, f"The prompt is too long for this page: only its last {len(kept):,} characters are used."
    return kept, seen, None


def options(max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any) -> dict[str, Any]:
    """The options of `LanguageModel.stream_ids`, from what a visitor gave for them (None: a field left empty). All
    tokens are kept by a top_k of 0 and a top_p of 1."""
    made = {
        "max_new_tokens": _whole("max_new_tokens", max_new_tokens),
        "temperature": _number("temperature", temperature),
        "top_k": _whole("top_k", top_k) or None,
        "top_p": None if top_p == 1 else _number("top_p", top_p),
        "seed": _whole("seed", seed),
    }
    if made["max_new_tokens"] > MOST_NEW_TOKENS:
        raise UserError(f"max_new_tokens {made['max_new_tokens']}: this page generates {MOST_NEW_TOKENS} at most")
    return made


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}: expected a number; fill it in")
    if not abs(value) <= LARGEST:
        raise UserError(f"{name} {in_short(value)}: not a number to compute with; give another")
    return float(value)


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise UserError(f"{name} {number:g}: expected a whole number")
    return int(number)


def continue_both(
    models: Sequence[LanguageModel], prompt: str, *, max_new_tokens: int, **sampling: Any
) -> Iterator[Step]:
    """A step for each new token, as soon as both models have it; the options are those of `stream_ids`.

    Each model generates by itself, as `gpt2 generate` does, and is then asked for the probabilities that follow its own
    text.
    """
    block_size = models[0].config.block_size
    contexts = [fit_context(model.encode(prompt), block_size, growing=False) for model in models]
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in models]
    streams = [model.stream_ids(prompt, max_new_tokens=max_new_tokens, **sampling) for model in models]
    for number in range(1, max_new_tokens + 1):
        # Before the models choose, because from logits that aren't finite they can't.
        probabilities = [next_probabilities(*pair) for pair in zip(models, contexts, strict=True)]
        tokens = [next(stream) for stream in streams]
        is_last = number == max_new_tokens  # a character that isn't complete then becomes U+FFFD
        texts = [
            decoder.decode(model.tokenizer.decode_bytes([token]), final=is_last)
            for decoder, model, token in zip(decoders, models, tokens, strict=True)
        ]
        is_comparable = contexts[0] == contexts[1]
        yield _step(number, tokens, texts, probabilities, models[0].tokenizer, is_comparable)
        contexts = [
            fit_context([*context, token], block_size, growing=True)
            for context, token in zip(contexts, tokens, strict=True)
        ]


def next_probabilities(model: LanguageModel, context: list[int]) -> np.ndarray:
    """The probabilities (V,) of the token that follows, before temperature, top-k and top-p change them; float64."""
    # JAX compiles every length that it meets. What follows a position doesn't change its logits, so zeros fill up to
    # a power of two.
    length = min(1 << (len(context) - 1).bit_length(), model.config.block_size)
    logits_V = model.logits([*context, *[0] * (length - len(context))])[len(context) - 1].astype(np.float64)
    if not np.isfinite(logits_V).all():
        raise UserError("the weights of this page give logits that are NaN or infinite; it needs others")
    exponentials_V = np.exp(logits_V - logits_V.max())
    return exponentials_V / exponentials_V.sum()


def _step(
    number: int,
    tokens: Sequence[int],
    texts: Sequence[str],
    probabilities: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    is_comparable: bool,
) -> Step:
    first_V, second_V = probabilities

    def token(i: int) -> Token:
        return Token(i, label(tokenizer.decode_bytes([i])), (float(first_V[i]), float(second_V[i])))

    likeliest = {int(i) for of_one in probabilities for i in np.argsort(-of_one, kind="stable")[:LIKELIEST]}
    listed = sorted((token(i) for i in likeliest | set(tokens)), key=lambda t: (-max(t.probabilities), t.id))
    return Step(
        number,
        chosen=(token(tokens[0]), token(tokens[1])),
        texts=(texts[0], texts[1]),
        largest=float(np.abs(first_V - second_V).max()) if is_comparable else None,
        likeliest=tuple(listed),
    )


_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def label(content: bytes) -> str:
    """A token by itself, all of it visible: its text, or the bytes of a part of a character."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in content)
    return "".join(_VISIBLE.get(c, c if c.isprintable() else f"U+{ord(c):04X}") for c in text)
