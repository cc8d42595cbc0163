"""GPT-2 in JAX. `load` gives a trained one, to generate text with; importing this imports no framework."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2_jax.language_model import JaxModel

__all__ = ["load"]


def load(
    source: str | Path, *, checkpoint: str = "latest", tokenizer: str | None = None, precision: str = "auto"
) -> "JaxModel":
    """The model at `source`: a path in any format that `gpt2 convert` reads, or a name of the Hub ("gpt2").

    `checkpoint` chooses one of a run's: "latest", "best" or a step. `tokenizer` is for weights that record none.
    `precision` is "float32", "bfloat16" or "float64"; "auto" is bfloat16 on an accelerator and float32 on CPU.
    Raises UserError if there is no such model.
    """
    # The formats are a layer above both frameworks, because they write the checkpoints of both. This function is above
    # the formats: nothing of this package calls it, so no layer depends on a higher one. The import contracts name it.
    from gpt2_convert import read_weights
    from gpt2_jax.language_model import JaxModel

    return JaxModel(read_weights(source, checkpoint), tokenizer=tokenizer, precision=precision)
