"""Compare the JAX and the PyTorch model: python parity/compare.py --help

Exit codes: 0 every check passed, 1 one failed, 2 it can't be done as asked.
"""

import sys
import time
from pathlib import Path

from rich.console import Console

from gpt2_core.cli import Parser, run
from gpt2_core.errors import UserError


def main(arguments: list[str]) -> None:
    options = _parser().parse(arguments)
    chosen = _chosen(options.checks)
    from parity import report

    folder = Path(options.report)
    report.open_folder(folder)

    # Everything is compared in float64, on the CPU.
    import jax

    jax.config.update("jax_platforms", "cpu")
    from gpt2_jax.runtime import configure

    configure("float64")
    from parity.formats import read_weights
    from parity.subjects import SMALL, random_weights, real_text
    from parity.suite import Subject, checks

    weights = read_weights(options.weights, options.checkpoint) if options.weights else random_weights(SMALL)
    subject = Subject(
        weights,
        real_text(weights),
        steps=options.steps or (40 if options.quick else 200),
        prompts=8 if options.quick else 64,
        new_tokens=32 if options.quick else 128,
    )
    console = Console()
    console.print(f"{weights.source}: {weights.config.parameter_count:,} parameters", highlight=False)
    results = []
    for name in chosen:
        start = time.perf_counter()
        with console.status(f"{name} ..."):
            results += checks()[name](subject)
        if not console.is_terminal:
            console.print(f"{name}: {time.perf_counter() - start:.1f} s", highlight=False)
    passed = report.write(folder, results, weights.source)
    wide = console if console.is_terminal else Console(width=132)
    wide.print(report.table(results))
    failed = sum(not r.passed for r in results)
    verdict = "the two are the same model" if passed else f"{failed} of {len(results)} cases FAILED"
    console.print(f"{verdict}; report in {folder}", style="bold green" if passed else "bold red", highlight=False)
    if not passed:
        sys.exit(1)


def _parser() -> Parser:
    parser = Parser(
        prog="compare.py",
        description="Prove in float64 that the JAX and the PyTorch model are the same: logits, gradients, training "
        "and generation, on a small random model or on weights of yours.",
    )
    parser.add_argument(
        "--weights",
        type=str,
        help="Run folder, checkpoint folder or .safetensors file to compare on. Left out: a small random model.",
    )
    parser.add_argument(
        "--checkpoint", type=str, default="latest", help="Which checkpoint of a run folder: latest, best or a step."
    )
    parser.add_argument("--report", type=str, default="parity_report", help="Folder for report.json and table.svg.")
    parser.add_argument("--checks", type=str, help="Names of checks to run, comma between. Left out: all.")
    parser.add_argument("--steps", type=int, help="Length of the loss curve, in steps. Left out: 200, quick 40.")
    parser.add_argument(
        "--quick", action="store_true", help="Shorter curve, fewer prompts: under a minute on two cores."
    )
    return parser


def _chosen(names: str | None) -> list[str]:
    known = ("weights", "forward", "gradients", "loss_curve", "generation")
    if names is None:
        return list(known)
    for name in names.split(","):
        if name not in known:
            raise UserError(f"--checks {names}: no check is called {name!r}; there are {', '.join(known)}")
    return names.split(",")


if __name__ == "__main__":
    run(main)
