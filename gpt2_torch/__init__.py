"""GPT-2 in PyTorch. `load` gives a trained one, to generate text with; importing this imports no framework."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt2_torch.language_model import TorchModel

__all__ = ["load"]


def load(
    source: str | Path,
    *,
    checkpoint: str = "latest",
    tokenizer: str | None = None,
    precision: str = "auto",
    device: str = "auto",
) -> "TorchModel":
    """The model at `source`: a path in any format that `gpt2 convert` reads, or a name of the Hub ("gpt2").

    `checkpoint` chooses one of a run's: "latest", "best" or a step. `tokenizer` is for weights that record none.
    `precision` is "float32", "bfloat16" or "float64"; "auto" is bfloat16 on an accelerator and float32 on CPU. `device`
    is "cpu", "cuda" or "mps"; "auto" takes the first there is of cuda, mps, cpu. Raises UserError if there is no such
    model.
    """
    # Above the formats, as gpt2_jax.load, which says why; the import contracts name it.
    from gpt2_convert import read_weights
    from gpt2_torch.language_model import TorchModel

    return TorchModel(read_weights(source, checkpoint), tokenizer=tokenizer, precision=precision, device=device)
