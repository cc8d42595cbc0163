"""The page as a folder that is a Hugging Face Space: weights, this project's code, and what the Hub asks for.

It holds the code itself, so that the Space shows what was tried here, whatever of this project is published where.
"""

import dataclasses
import shutil
import sys
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement

from gpt2_convert import write_weights
from gpt2_core.errors import UserError
from gpt2_core.weights import Weights
from gpt2_core.weights.tokenizer import choose_tokenizer

PROJECT = "gpt2-jax"
PACKAGES = ("gpt2_commands", "gpt2_convert", "gpt2_core", "gpt2_jax", "gpt2_page", "gpt2_torch")
WEIGHTS = "weights.safetensors"

_README = """\
---
title: GPT-2 in JAX and in PyTorch
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: mit
---

One GPT-2 continues a prompt in JAX and in PyTorch, side by side, with the probability of each token in both.

Written by `gpt2 page --space`. `python app.py` shows it on your own machine.
"""

_APP = '''\
"""The page of this Space: python app.py"""

from pathlib import Path

from gpt2_commands.page import main
from gpt2_core.cli import run

WEIGHTS = Path(__file__).parent / "{weights}"
OPTIONS = ["--weights", str(WEIGHTS), "--precision", "{precision}", "--host", "0.0.0.0"]

if __name__ == "__main__":
    run(lambda arguments: main([*OPTIONS, *arguments], "app.py"))
'''

# A Space without a GPU, for which PyTorch's packages of the Python Package Index bring gigabytes of CUDA.
_REQUIREMENTS = "--extra-index-url https://download.pytorch.org/whl/cpu\n"


def write(folder: Path, weights: Weights, tokenizer: str | None, precision: str, force: bool) -> None:
    """Write the Space. With `force` its files are replaced where they are, and others in the folder (.git) stay.

    Raises UserError if something is there and `force` isn't given, and for a folder that is no Space.
    """
    _check_free(folder, force)
    weights = dataclasses.replace(weights, tokenizer=choose_tokenizer(weights, tokenizer).name)
    folder.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(Path(str(files(name))), folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_weights(weights, folder / WEIGHTS, "safetensors", force=force)
    texts = {
        "LICENSE": _licence(),
        "requirements.txt": _REQUIREMENTS + "".join(f"{line}\n" for line in requirements()),
        "app.py": _APP.format(weights=WEIGHTS, precision=precision),
        "README.md": _README.format(gradio=metadata.version("gradio"), python=".".join(map(str, sys.version_info[:2]))),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def requirements() -> list[str]:
    """What this project needs, in the versions that are installed here; Gradio is what the Space itself brings."""
    needed = [Requirement(line) for line in metadata.requires(PROJECT) or []]
    names = [one.name for one in needed if one.marker is None]
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def _licence() -> str:
    found = metadata.distribution(PROJECT)
    # A clone's metadata lies beside the file itself.
    return found.read_text("licenses/LICENSE") or Path(str(found.locate_file("LICENSE"))).read_text(encoding="utf-8")


def _check_free(folder: Path, force: bool) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if not force:
        raise UserError(f"--space {folder}: exists; add --force to replace the Space in it, or name another folder")
    if not (folder / "app.py").is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"--space {folder}: holds no Space, so --force doesn't replace it; name another folder")
