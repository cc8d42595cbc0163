"""gpt2 convert: weights from one format into another, bit for bit."""

import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gpt2_convert import FORMATS, described, open_weights, write_weights
from gpt2_core.cli import Parser
from gpt2_core.errors import RunError, UserError
from gpt2_core.weights import DTYPES, LazyArrays, LazyTensor, Weights


def main(arguments: list[str], command: str = "gpt2 convert") -> None:
    options = parser(command).parse(arguments)
    # A terminated conversion removes its temporary files, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(markup=False, soft_wrap=True, highlight=False)
    target = Path(options.target)
    weights = open_weights(options.source, options.checkpoint, options.source_format, options.mlp)
    if target.resolve() in (Path(weights.source).resolve(), *Path(weights.source).resolve().parents):
        raise UserError(f"{target}: contains the source itself; name another target")
    for note in weights.notes:
        console.print(f"note: {note}")
    if options.dtype is not None:
        weights = _mapped(weights, lambda name, tensor: tensor.astype(DTYPES[options.dtype]))

    with _progress(console) as progress:
        shown = _watched(weights, progress, console, f"{options.to}: {target.name}")
        write_weights(shown, target, options.to, force=options.force)
    console.print(f"{weights.source} -> {target} ({options.to}): {weights.config.parameter_count:,} parameters")
    for note in FORMATS[options.to].notes(weights):
        console.print(f"note: {note}")
    if options.verify:
        _verify(weights, target, options.to, console)


def _mapped(weights: Weights, change: Callable[[str, LazyTensor], LazyTensor]) -> Weights:
    return dataclasses.replace(
        weights, arrays=LazyArrays({name: change(name, tensor) for name, tensor in weights.tensors.items()})
    )


def _watched(weights: Weights, progress: Progress, console: Console, label: str) -> Weights:
    """The same weights; reading one advances the progress bar, and prints a warning if it isn't finite."""
    bar = progress.add_task(label, total=weights.nbytes)
    seen: set[str] = set()

    def watch(name: str, tensor: LazyTensor) -> LazyTensor:
        def see(array: np.ndarray) -> np.ndarray:
            if name not in seen:
                seen.add(name)
                progress.advance(bar, tensor.nbytes)
                if wrong := int(array.size - np.isfinite(array).sum()):
                    console.print(f"warning: {name} has {wrong:,} values that are NaN or infinite; kept as they are")
            return array

        return tensor.map(tensor.shape, see)

    return _mapped(weights, watch)


def _verify(weights: Weights, target: Path, to: str, console: Console) -> None:
    """Read the result back, compare every bit, and run it in both frameworks; raises RunError on a difference."""
    back = open_weights(target, form=to)
    for name, tensor in weights.tensors.items():
        there = back.tensors[name]
        same = (tensor.dtype, tensor.shape) == (there.dtype, there.shape)
        if not same or not np.array_equal(*(np.ascontiguousarray(t.read()).view(np.uint8) for t in (tensor, there))):
            raise RunError(f"{target}: {name} was read back with other values than were written; don't use this file")
    console.print(f"verified: {len(weights.arrays)} tensors read back bit for bit")
    if not all(np.isfinite(back.arrays[name]).all() for name in back.arrays):
        console.print("no forward pass: some values aren't finite")
        return
    from parity.gpt2.checks.forward import agreement_in_float32

    difference, limit = agreement_in_float32(back)
    said = f"a forward pass in float32, JAX against PyTorch: logits differ by {difference:.1e} of the largest"
    if not difference <= limit:
        raise RunError(f"{target}: {said}, more than {limit:.0e}; run `gpt2 parity --weights {target}`")
    console.print(f"verified: {said} (limit {limit:.0e})")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def parser(command: str) -> Parser:
    names = Literal[tuple(FORMATS)]
    made = Parser(
        prog=command,
        description="Convert GPT-2 weights between formats, bit for bit. docs/conversion.md describes each format.",
    )
    made.add_argument(
        "source",
        type=str,
        help=f"Weights to read: {described()}; or the name of a model on the Hugging Face Hub (gpt2, "
        "openai-community/gpt2). The format is detected from the content.",
    )
    made.add_argument(
        "target", type=str, help=f"File ({_names(is_folder=False)}) or folder ({_names(is_folder=True)}) to write."
    )
    made.add_argument(
        "--to",
        type=names,
        required=True,
        help="; ".join(f"{name}: {form.help}" for name, form in FORMATS.items()) + ".",
    )
    made.add_argument("--from", dest="source_format", type=names, help="Format of the source. Left out: detected.")
    made.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16"],
        help="Convert the weights to this dtype. Left out: their own.",
    )
    made.add_argument(
        "--mlp",
        type=Literal["gelu_exact", "gelu_tanh"],
        help="The GELU of a source that doesn't record it. Left out: "
        + "; ".join(f"{name}: {form.assumes}" for name, form in FORMATS.items() if form.assumes)
        + ".",
    )
    made.add_argument(
        "--checkpoint", type=str, default="latest", help="Which checkpoint of a run folder: latest, best or a step."
    )
    made.add_argument(
        "--verify",
        action="store_true",
        help="Read the result back, compare it bit for bit, and run a forward pass of it in both frameworks.",
    )
    made.add_argument("--force", action="store_true", help="Replace weights that are at the target.")
    return made


def _names(*, is_folder: bool) -> str:
    return ", ".join(name for name, form in FORMATS.items() if form.is_folder == is_folder)
