"""The tokenizer that weights were trained with."""

from gpt2_core.data.tokenizer import NAMES, Tokenizer, get_tokenizer, vocab_size
from gpt2_core.errors import UserError
from gpt2_core.weights.canonical import Weights


def choose_tokenizer(weights: Weights, asked: str | None) -> Tokenizer:
    """The tokenizer that is recorded with the weights; if none is, the one asked for, else GPT-2's.

    Raises UserError if one is recorded and another is asked for, and if it has more ids than the model.
    """
    if asked and weights.tokenizer not in (None, asked):
        raise UserError(
            f"--tokenizer {asked}: {weights.source} was trained with the tokenizer {weights.tokenizer}; leave "
            "--tokenizer out"
        )
    name, ids = asked or weights.tokenizer or "gpt2", weights.config.vocab_size
    if vocab_size(name) > ids:
        says = f"--tokenizer {asked}: " if asked else ""
        unknown = "" if asked or weights.tokenizer else " doesn't say which tokenizer it was trained with, and"
        fitting = [known for known in NAMES if vocab_size(known) <= ids]
        use = f"use --tokenizer {' or '.join(fitting)}" if fitting else "no tokenizer that --tokenizer takes has so few"
        raise UserError(
            f"{says}{weights.source}{unknown} has {ids} ids, too few for the {vocab_size(name)} of the tokenizer "
            f"{name}; {use}"
        )
    return get_tokenizer(name)
