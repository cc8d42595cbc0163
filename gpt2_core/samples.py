"""Generated text in a run folder."""

from gpt2_core.files import write_atomically
from gpt2_core.run_folder import RunFolder


def write_sample(folder: RunFolder, step: int, text: str) -> None:
    """Write `samples/<step>.txt`."""
    folder.samples.mkdir(exist_ok=True)
    write_atomically(folder.samples / f"{step}.txt", text + "\n")
