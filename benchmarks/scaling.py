"""bench.py scaling: how a step's time and memory grow with the model, the batch and the number of devices."""

import dataclasses
import math
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import add_json, add_options, configuration
from benchmarks.measure import interleave, positive, sides, write_json
from gpt2_core.cli import Parser, with_sizes
from gpt2_core.config import TrainConfig
from gpt2_core.errors import UserError

_SIDES = {
    "jax": ("benchmarks.train:jax_session", {}),
    "torch": ("benchmarks.train:torch_session", {"compile": False}),
}
# A model whose every size may be quadrupled on a laptop.
_SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 1024}
AXES = ("block_size", "batch", "layers", "vocabulary", "devices")


def main(arguments: list[str]) -> None:
    options = _parser().parse(with_sizes(arguments, _SMALL))
    positive(options, "batch", "rounds", "steps")
    axes = options.axes.split(",")
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"--axes {options.axes}: no axis is called {axis!r}; use some of {','.join(AXES)}")
    frameworks = options.frameworks.split(",")
    for name in frameworks:
        if name not in _SIDES:
            raise UserError(
                f"--frameworks {options.frameworks}: unknown framework {name!r}; use jax, torch or jax,torch"
            )
    factors = [_number(text) for text in options.factors.split(",")]
    base = configuration(options)
    console = Console(markup=False, soft_wrap=True, highlight=False)
    rows = []
    for axis in axes:
        for factor in factors:
            config = grown(base, axis, factor)
            # PyTorch needs a process for each device (torchrun), which this doesn't measure.
            chosen = [name for name in frameworks if name == "jax" or axis != "devices"]
            rows += [row | {"axis": axis, "factor": factor} for row in _measure(config, chosen, options, console)]
    _show(rows, console)
    write_json(options.json, ["scaling", *arguments], {"config": dataclasses.asdict(base), "rows": rows})


def grown(config: TrainConfig, axis: str, factor: int) -> TrainConfig:
    """The configuration with one of AXES so many times as large; more devices share the batch."""
    model = config.model
    if axis == "batch":
        return dataclasses.replace(config, batch_size=factor * config.batch_size)
    if axis == "devices":
        return dataclasses.replace(config, mesh=factor)
    name = {"block_size": "block_size", "layers": "n_layer", "vocabulary": "vocab_size"}[axis]
    return dataclasses.replace(config, model=dataclasses.replace(model, **{name: factor * getattr(model, name)}))


def growth(factors: list[int], values: list[float]) -> float:
    """The exponent e of value ~ factor^e between the two largest factors: 1 is linear."""
    (a, b), (x, y) = factors[-2:], values[-2:]
    return math.log(y / x) / math.log(b / a)


def _measure(config: TrainConfig, frameworks: list[str], options: Any, console: Console) -> list[dict[str, Any]]:
    spec = {"config": dataclasses.asdict(config)}
    functions = {name: (_SIDES[name][0], spec | _SIDES[name][1]) for name in frameworks}
    with sides(functions, console) as started:
        seconds = interleave(started, rounds=options.rounds, units=options.steps, console=console)
        return [
            {
                "side": name,
                "step_seconds": statistics.median(seconds[name]),
                "tokens_per_second": config.tokens_per_step / statistics.median(seconds[name]),
                "step_bytes": (side.facts | side.end())["step_bytes"],
            }
            for name, side in started.items()
        ]


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("axis", "x", "side", "step, ms", "tokens/s", "MB a device", "time", "memory")
    for row in rows:
        before = [
            r for r in rows if (r["axis"], r["side"]) == (row["axis"], row["side"]) and r["factor"] < row["factor"]
        ]
        growths = ["", ""]
        if before:
            pair = [before[-1], row]
            factors = [r["factor"] for r in pair]
            growths = [f"{growth(factors, [r[key] for r in pair]):.2f}" for key in ("step_seconds", "step_bytes")]
        table.add_row(
            row["axis"],
            str(row["factor"]),
            row["side"],
            f"{1e3 * row['step_seconds']:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_bytes'] / 1e6:,.1f}",
            *growths,
        )
    console.print(table)
    console.print("time, memory: growth since the row before, as an exponent of the size; 1 is linear")


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--factors {text}: expected comma-separated positive integers")
    return int(text)


def _parser() -> Parser:
    parser = Parser(prog="bench.py scaling", description=__doc__.partition(": ")[2])
    add_options(parser, preset=None, batch=8)
    add_json(parser)
    parser.add_argument("--axes", type=str, default=",".join(AXES), help="Comma-separated sizes to increase.")
    parser.add_argument("--factors", type=str, default="1,2,4", help="Comma-separated multiples of each size.")
    parser.add_argument("--frameworks", type=str, default="jax,torch", help="jax, torch (uncompiled) or both.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds, in each of which every side is measured.")
    parser.add_argument("--steps", type=int, default=3, help="Steps in a round.")
    return parser
