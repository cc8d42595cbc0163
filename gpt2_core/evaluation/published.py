"""Published figures of OpenAI's GPT-2, by preset, each with its source: what one's own figures are read beside."""

from typing import NamedTuple

from gpt2_core.config import PRESETS, ModelConfig


class Published(NamedTuple):
    """Figures of a variant by preset, and where they are published; `differs` says what is another there."""

    figures: dict[str, float]
    source: str
    differs: str | None = None


_PAPER = "Radford et al. 2019, table 3"
_LLMC = "llm.c, dev/data/hellaswag.py"
_DISCUSSION = "huggingface.co/openai-community/gpt2/discussions/90"

# By task and figure.
PUBLISHED = {
    ("hellaswag_harness", "acc"): Published({"gpt2": 0.2892, "gpt2-xl": 0.4004}, f"lm-eval's, quoted in {_LLMC}"),
    ("hellaswag_harness", "acc_norm"): Published({"gpt2": 0.3114, "gpt2-xl": 0.5089}, f"lm-eval's, quoted in {_LLMC}"),
    ("hellaswag_llmc", "acc"): Published({"gpt2": 0.2859, "gpt2-xl": 0.3842}, _LLMC),
    ("hellaswag_llmc", "acc_norm"): Published({"gpt2": 0.2955, "gpt2-xl": 0.4893}, _LLMC),
    ("lambada_openai", "acc"): Published({"gpt2": 0.3256}, f"lm-eval's, reported in {_DISCUSSION}"),
    ("lambada_openai", "perplexity"): Published({"gpt2": 40.06}, f"lm-eval's, reported in {_DISCUSSION}"),
    ("wikitext103", "word_perplexity"): Published(
        {"gpt2": 37.50, "gpt2-medium": 26.37, "gpt2-large": 22.05, "gpt2-xl": 17.48},
        _PAPER,
        "with OpenAI's own detokeniser and windows, which aren't published",
    ),
}


def preset_of(config: ModelConfig) -> str | None:
    """The preset of GPT-2 that has this model's sizes."""
    return next(
        (name for name, sizes in PRESETS.items() if all(getattr(config, key) == n for key, n in sizes.items())), None
    )
