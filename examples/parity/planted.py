"""Whether `parity` names the line of a mistake: changes planted at random in the models of `bonsai.py`.

    python examples/parity/planted.py PATH_TO_CHECKOUT [--pairs qwen3,vit] [--count 100] [--misses]

Each change is one operation of the candidate's program replaced by another one (`parity.pair.mutation`). Those that
move the output by less than a rounding of float32 are left out. The table says in how many cases the lines that the
first divergence names hold the changed one, and in how many of these there are at most three.
"""

import argparse
from pathlib import Path

import bonsai
import numpy as np
import pairs
from rich.console import Console
from rich.table import Table

from parity.engine.results import relative_to_largest
from parity.models.jax_model import arrays_of, recording
from parity.pair import divergence
from parity.pair.comparison import opened
from parity.pair.mutation import Mutant, Runner, mutants

LEAST = 1e-7
FEW = 3


def planted(pair: pairs.Pair, checkout: bonsai.Checkout, count: int, seed: int) -> list[tuple[Mutant, list[str]]]:
    """Changes of the pair's candidate, and the lines that the first divergence names."""
    comparison = opened(
        pair.make_reference,
        pair.make_candidate(checkout),
        inputs=pair.inputs,
        to_candidate=pair.to_candidate,
        ignore=pair.ignore,
    )
    model, (theirs, ours) = comparison.candidate, comparison.cases[0]
    reference = comparison.reference.record(comparison.weights["reference"], theirs)
    names = [w.name for w in model.weights()]
    program = model.program(ours)
    values = program.run([comparison.weights["candidate"][n] for n in names], arrays_of(ours), lifted=True)
    runner, before = Runner(program, values), values[program.outputs[0]]
    every = mutants(program, values)
    found: list[tuple[Mutant, list[str]]] = []
    for i in np.random.default_rng(seed).permutation(len(every)):
        mutant = every[i]
        changed = runner.changed(mutant)
        if changed is None or program.outputs[0] not in changed or not mutant.place:
            continue
        if relative_to_largest(changed[program.outputs[0]], before) <= LEAST:
            continue
        held = recording(
            program.with_operation(mutant.position, mutant.operation), values | changed, names, ours.names()
        )
        place = divergence.locate(held, reference, [], comparison.made_of("candidate"))
        found.append((mutant, place.lines if place else []))
        if len(found) == count:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--count", type=int, default=100, help="changes in all pairs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--misses", action="store_true", help="list what was not named")
    arguments = pairs.parse(parser, bonsai.PAIRS)
    checkout = bonsai.Checkout(arguments.checkout, mended=True)
    table = Table("pair", "planted", "line named", f"in at most {FEW} lines")
    totals, console = np.zeros(3, int), Console(markup=False)
    for number, pair in enumerate(arguments.pairs):
        share = arguments.count // len(arguments.pairs) + (number < arguments.count % len(arguments.pairs))
        found = planted(pair, checkout, share, arguments.seed)
        named = [mutant.place in lines for mutant, lines in found]
        few = [n and len(lines) <= FEW for n, (_, lines) in zip(named, found, strict=True)]
        totals += len(found), sum(named), sum(few)
        table.add_row(pair.name, str(len(found)), str(sum(named)), str(sum(few)))
        for right, (mutant, lines) in zip(named, found, strict=True):
            if arguments.misses and (not right or len(lines) > FEW):
                console.print(f"{pair.name}: {mutant.story} at {mutant.operation}: {lines}", soft_wrap=True)
    table.add_row("all", *map(str, totals))
    console.print(table)


if __name__ == "__main__":
    main()
