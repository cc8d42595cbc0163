"""gpt2 evaluate: published tasks, and the loss of any tokens."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gpt2_convert import read_weights
from gpt2_core.cli import Parser
from gpt2_core.errors import UserError
from gpt2_core.evaluation.rows import read_rows
from gpt2_core.evaluation.run import Evaluated, Result, chosen_tasks, evaluate_task, evaluate_tokens
from gpt2_core.evaluation.scoring import ScoreBatch
from gpt2_core.evaluation.tasks import GROUPS, TASKS
from gpt2_core.memory import keep_freed_memory
from gpt2_core.weights import Weights
from gpt2_core.weights.tokenizer import choose_tokenizer
from gpt2_evaluate.backends import jax_scorer, torch_scorer


def main(arguments: list[str], command: str = "gpt2 evaluate") -> None:
    keep_freed_memory()
    options = parser(command).parse(arguments)
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        raise UserError("--batch_size and --limit: must be 1 or more")
    names = chosen_tasks(options.tasks)
    if options.backend == "jax":
        if options.device is not None:
            raise UserError("--device: chooses PyTorch's device; with --backend jax set JAX_PLATFORMS=cpu for the CPU")
        from gpt2_jax.runtime import configure

        configure(options.precision, options.mesh)
    elif options.mesh is not None:
        raise UserError(f"--mesh {options.mesh}: --backend torch computes on one device; leave it out")

    weights = read_weights(options.weights, options.checkpoint)
    tokenizer = choose_tokenizer(weights, options.tokenizer)
    rows = {
        name: read_rows(name, TASKS[name].dataset, options.data_dir, options.limit) for name in names if name in TASKS
    }
    model = Evaluated(weights.config, tokenizer, _scorer(weights, options), options.batch_size)
    results: list[Result] = []
    with _progress() as progress:

        def begin(task: str, total: int):
            bar = progress.add_task(task, total=total)
            return lambda count: progress.advance(bar, count)

        for name in names:
            if name in rows:
                results += evaluate_task(model, name, rows[name], begin)
            else:
                results += evaluate_tokens(model, name, options.limit, begin)
    if options.json:
        print(json.dumps({"weights": weights.source, "results": [_as_json(result) for result in results]}, indent=2))
    else:
        _print_tables(results)


def _scorer(weights: Weights, options) -> ScoreBatch:
    if options.backend == "jax":
        return jax_scorer(weights, mesh=options.mesh, precision=options.precision, batch_size=options.batch_size)
    return torch_scorer(weights, device=options.device or "auto", precision=options.precision)


def _progress() -> Progress:
    console = Console(markup=False, stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _as_json(result: Result) -> dict:
    finite = result.value if math.isfinite(result.value) else None  # JSON has no infinity
    return dataclasses.asdict(result) | {"value": finite}


def _print_tables(results: Iterable[Result]) -> None:
    """One table a task, with its variant above: a figure means nothing without it."""
    console = Console(markup=False, highlight=False)
    for (task, variant, examples), of_task in itertools.groupby(results, key=lambda r: (r.task, r.variant, r.examples)):
        console.print(f"{task}: {variant}; {examples:,} examples")
        table = Table("figure", "value", "definition", "published for OpenAI's weights of this size")
        for result in of_task:
            known = result.published
            said = f"{known.value:g} ({known.model}; {known.source})" if known else "none known for this variant"
            table.add_row(result.figure, f"{result.value:.4f}", result.meaning, said)
        console.print(table)


def parser(command: str) -> Parser:
    parser = Parser(
        prog=command,
        description="Evaluate a GPT-2 of either framework on published tasks. docs/evaluation.md defines each figure.",
    )
    parser.add_weights_arguments()
    parser.add_argument(
        "--tasks",
        type=str,
        required=True,
        help=f"Tasks, with commas between them: {', '.join([*GROUPS, *TASKS])}, or the path of tokens, as the "
        "trainers' --data.tokens takes it, for the loss on their validation split.",
    )
    parser.add_argument("--backend", type=Literal["jax", "torch"], default="jax", help="Framework that computes.")
    parser.add_argument("--batch_size", type=int, default=32, help="Sequences computed at once, over all devices.")
    parser.add_argument(
        "--mesh", type=str, help="JAX's devices: 8, or data=2,fsdp=2. Left out: all accelerators, else one CPU device."
    )
    parser.add_argument(
        "--precision",
        type=Literal["auto", "float32", "tf32", "bfloat16", "float64"],
        default="auto",
        help="Dtype of the matrix products; auto is bfloat16 on an accelerator and float32 on CPU.",
    )
    parser.add_argument(
        "--device", type=Literal["auto", "cpu", "cuda", "mps"], help="PyTorch's device. Left out: auto."
    )
    parser.add_argument(
        "--data_dir",
        type=str,
        help="Folder with the tasks' data sets as TASK.jsonl, in the Hub's format. Left out: the Hugging Face Hub.",
    )
    parser.add_argument("--limit", type=int, help="Examples (of tokens: windows) of each task. Left out: all.")
    parser.add_argument("--json", action="store_true", help="Print the results as JSON instead of tables.")
    return parser
