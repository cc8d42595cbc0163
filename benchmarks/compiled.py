"""bench.py compiled: the program that a GPU would run, compiled and analysed without a GPU."""

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.compiler_env import ROOT, environment
from benchmarks.hlo_account import Account, account
from benchmarks.hlo_cost import COPY, Collective
from benchmarks.measure import positive, write_json
from gpt2_core.cli import Parser, with_sizes
from gpt2_core.config import PRESETS, ModelConfig, TrainConfig
from gpt2_core.errors import RunError, UserError
from gpt2_core.files import write_atomically
from gpt2_core.runs.log import peak_flops
from gpt2_jax.mesh import check_option
from gpt2_jax.planning import gpus

# Without a GPU nothing can be autotuned, and Triton's matrix products would get arbitrary tiles.
_FLAGS = ("--xla_gpu_enable_triton_gemm=false",)
_LEFT_OUT = (
    "Left out: the time to launch kernels, savings by caches, the latency of collectives, cuDNN's workspace. cuDNN's "
    "attention counts at 0.6 of the rate of a matrix product. Triton's products are off: they can't be autotuned "
    "without a GPU."
)
# Width of the tables on a narrower terminal: shapes and names are long.
_WIDTH = 170
# The options that may be given with --read; the others say how to compile.
_FOR_READING = {"--read", "--target", "--top", "--json", "--against", "--help", "-h"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled train step: the optimized HLO of one device, and the compiler's account of its memory."""

    text: str
    argument_bytes: int
    temp_bytes: int
    versions: dict[str, str]


def main(arguments: list[str]) -> None:
    options = _parser().parse(["--model.vocab_size=50304", *with_sizes(arguments, PRESETS["gpt2"])])
    positive(options, "batch", "accumulation", "top")
    target = gpus.load(options.target)
    earlier = _read_earlier(options.against) if options.against else None
    console = Console(markup=False, soft_wrap=True, highlight=False, width=max(_WIDTH, Console(markup=False).width))
    if options.read:
        _refuse_options_of_compiling(arguments)
        found = account(_read_text("--read", options.read), target)
        results = {"target": target.name} | dataclasses.asdict(found)
    else:
        config = configuration(options)
        program = compile_program(config, options.target, options.flag or [], console)
        if options.hlo:
            _write_text(options.hlo, program.text)
        found = account(program.text, target)
        results = {
            "target": target.name,
            "flags": options.flag or [],
            "config": dataclasses.asdict(config),
            "versions": program.versions,
            "argument_bytes": program.argument_bytes,
            "temp_bytes": program.temp_bytes,
            "mfu_at_most": mfu_at_most(found, config, target),
        } | dataclasses.asdict(found)
        _show_program(console, config, results)
    _show_account(console, found, results, options.top)
    if earlier is not None:
        _show_difference(console, results, earlier, options.against, options.top)
    console.print(_LEFT_OUT)
    write_json(options.json, ["compiled", *arguments], results)


def configuration(options: Any) -> TrainConfig:
    """The training that parsed options ask for."""
    config = TrainConfig(
        model=ModelConfig(**{f.name: options.model[f.name] for f in dataclasses.fields(ModelConfig)}),
        batch_size=options.batch,
        accumulation=options.accumulation,
        precision="bfloat16",
        mesh=str(options.mesh),
        attention=options.attention,
        norm_kernel=options.norm_kernel,
        scan_layers=options.scan_layers,
        remat=options.remat,
        gradient_exchange=options.gradient_exchange,
    )
    check_option(config)
    if config.attention == "cudnn" and config.model.dropout > 0:
        raise UserError(
            f"--attention cudnn: has no dropout, and model.dropout is {config.model.dropout}; use recompute"
        )
    return config


def compile_program(config: TrainConfig, target: str, flags: Sequence[str], console: Console) -> Program:
    """Compile the trainer's step for a GPU, without one, in a process of the environment made for it.

    `flags` are XLA's, in addition to XLA_FLAGS. Raises UserError for a flag that XLA doesn't know, RunError if the
    environment can't be made or the program can't be compiled.
    """
    python = environment(console)
    spec = {
        "config": dataclasses.asdict(config),
        "target": gpus.description(target),
        "capability": gpus.load(target).capability,
    }
    # JAX's own settings (of the tests, say) are not the trainer's.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    all_flags = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS, *flags]).strip()
    ours = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": all_flags, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name, console.status(f"compiling for {target}"):
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(spec))
        command = [str(python), "-m", "benchmarks.gpu_program", str(folder / "spec.json"), name]
        ended = subprocess.run(command, env=kept | ours, capture_output=True, text=True)
        if ended.returncode:
            raise _failure(ended.stderr, flags)
        facts = json.loads((folder / "facts.json").read_text())
        return Program(text=(folder / "program.txt").read_text(), **facts)


def _failure(said: str, flags: Sequence[str]) -> UserError:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["the compiler printed nothing"]
    unknown = next((line for line in lines if "Unknown flag" in line), None)
    if unknown is not None:
        return UserError(f"--flag {' '.join(flags)}: XLA doesn't know {unknown.rpartition(':')[2].strip()}")
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return RunError(f"the step can't be compiled: {(errors or lines)[-1]}")


def mfu_at_most(found: Account, config: TrainConfig, target: gpus.Gpu) -> float:
    """Model FLOPs utilisation of a step that takes the lower bound: the floor and the exposed collectives."""
    devices = found.devices
    peak = devices * peak_flops(target.name, config.precision)
    seconds = (found.floor_ms + found.exposed_ms) / 1e3
    return config.tokens_per_step * config.training_flops_per_token / (peak * seconds)


def _refuse_options_of_compiling(arguments: list[str]) -> None:
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    for option in given:
        if option not in _FOR_READING:
            raise UserError(f"{option}: an option for compiling, and --read compiles nothing; leave one of them out")


def _read_text(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: can't be read ({error}); give a file that this command wrote") from error


def _write_text(path: str, text: str) -> None:
    try:
        write_atomically(Path(path), text)
    except OSError as error:
        raise UserError(f"--hlo {path}: can't be written ({error.strerror})") from error


def _read_earlier(path: str) -> dict[str, Any]:
    """The results of an earlier run's --json."""
    try:
        results = json.loads(_read_text("--against", path))["results"]
        missing = {field.name for field in dataclasses.fields(Account)} - set(results)
    except (ValueError, KeyError, TypeError):
        missing = {"results"}
    if missing:
        raise UserError(f"--against {path}: no results of this command; give what --json of an earlier run wrote")
    return results


def _show_program(console: Console, config: TrainConfig, results: dict[str, Any]) -> None:
    model = config.model
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    console.print(f"{model.parameter_count:,} parameters, {model.n_layer} layers x {model.n_embd}")
    console.print(
        f"batch {config.batch_size} x {config.tokens_per_sequence}, accumulation {config.accumulation}, "
        f"mesh {config.mesh}, vocabulary {model.vocab_size}, {config.attention} attention, "
        f"{config.norm_kernel} layer norm, {config.precision}"
    )
    console.print(f"{results['target']}; {versions}")
    console.print(
        f"memory of a device: arguments {_gb(results['argument_bytes'])}, temporary {_gb(results['temp_bytes'])}"
    )


def _show_account(console: Console, found: Account, results: dict[str, Any], top: int) -> None:
    loops = ", ".join(f"{loop.name} x {loop.trips or 'unknown'}" for loop in found.loops)
    console.print(f"{found.kernels:,} kernels a step; loops: {loops or 'none'}")
    rows = [
        (p.launches, f"{p.flops / 1e12:.2f}", f"{p.ms:.2f}", f"{p.share:.1%}", "float32" if p.float32 else "", p.shapes)
        for p in found.products
    ]
    _show(console, "matrix products", ["launches", "TFLOP", "least ms", "of floor", "", "shapes"], rows)
    rows = [(t.launches, _gb(t.bytes), f"{t.ms:.2f}", kind) for kind, t in found.bytes_by_kind.items()]
    _show(console, "kinds of kernels", ["launches", "read, written", "least ms", "kind"], rows)
    copies = [group for group in found.groups if group.kind == COPY]
    for title, groups in (("largest groups", found.groups), ("copies, transposes and broadcasts", copies)):
        rows = [(g.launches, _gb(g.bytes), f"{g.ms:.2f}", g.source, g.kind, g.shape) for g in groups[:top]]
        _show(console, title, ["launches", "read, written", "least ms", "operation", "kind", "result"], rows)
    rows = [_collective_row(c) for c in found.collectives]
    columns = ["kind", "times", "MB each", "devices", "least ms", "exposed ms", "beside it", "where"]
    _show(console, "collectives", columns, rows)
    parts = ", ".join(f"{part} {ms:.2f}" for part, ms in found.parts_ms.items())
    console.print(f"floor: {found.floor_ms:.2f} ms a step: {parts} (all else at full bandwidth)")
    if found.collectives:
        console.print(
            f"collectives: at least {found.exchange_ms:.2f} ms, of which {found.exposed_ms:.2f} ms are exposed"
        )
    if "mfu_at_most" in results:
        console.print(f"MFU: at most {results['mfu_at_most']:.1%}")


def _collective_row(c: Collective) -> tuple[Any, ...]:
    sizes = " + ".join(f"{size / 1e6:.3f} {dtype}" for dtype, size in c.bytes_by_dtype.items())
    beside = (
        f"{c.kernels_beside} kernels, {c.flops_beside / 1e12:.2f} TFLOP" if c.kernels_beside else "waited for at once"
    )
    where = " > ".join([*c.loops, c.source])
    return c.kind, c.times, sizes, c.devices, f"{c.times * c.ms:.3f}", f"{c.times * c.exposed_ms:.3f}", beside, where


def _show_difference(console: Console, new: dict[str, Any], old: dict[str, Any], path: str, top: int) -> None:
    console.print(f"beside {path}:")
    rows = [
        (what, f"{before:,.2f}", f"{after:,.2f}", f"{after - before:+,.2f}")
        for what, before, after in _changes(old, new)
    ]
    _show(console, "totals", ["", "before", "now", "change"], rows)
    rows = [(f"{change:+.3f}", f"{before:.3f}", f"{after:.3f}", name) for name, before, after, change in
            changed_groups(old["groups"], new["groups"])[:top]]  # fmt: skip
    _show(console, "groups that changed most", ["change, ms", "before", "now", "operation"], rows)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Both results' totals: (name with its unit, before, now)."""

    def totals(results: dict[str, Any]) -> dict[str, float]:
        found = {"floor, ms": results["floor_ms"], "exposed collectives, ms": results["exposed_ms"]}
        found |= {f"{part}, ms": ms for part, ms in results["parts_ms"].items()}
        found |= {"kernels": results["kernels"]}
        for name in ("argument_bytes", "temp_bytes"):
            if name in results:
                found[f"{name.replace('_bytes', ' memory')}, GB"] = results[name] / 1e9
        return found | {f"{kind}, GB": traffic["bytes"] / 1e9 for kind, traffic in results["bytes_by_kind"].items()}

    before, after = totals(old), totals(new)
    return [(name, before.get(name, 0.0), after.get(name, 0.0)) for name in {**before, **after}]


def changed_groups(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[tuple[str, float, float, float]]:
    """(operation, ms before, ms now, change) of the groups whose lower bound differs, largest change first."""

    def by_source(groups: list[dict[str, Any]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for group in groups:
            found[group["source"]] = found.get(group["source"], 0.0) + group["ms"]
        return found

    before, after = by_source(old), by_source(new)
    rows = [(name, before.get(name, 0.0), after.get(name, 0.0)) for name in {**before, **after}]
    changed = [(name, a, b, b - a) for name, a, b in rows if a != b]
    return sorted(changed, key=lambda row: -abs(row[3]))


def _show(console: Console, title: str, columns: list[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Print a table, unless it is empty; a row's last cell may be long."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column, cell in zip(columns, rows[0], strict=True):
        is_number = not isinstance(cell, str) or cell.replace(".", "").replace("%", "").isdigit()
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    console.print()


def _gb(number: float) -> str:
    return f"{number / 1e9:.2f} GB"


def _parser() -> Parser:
    parser = Parser(prog="bench.py compiled", description=__doc__.partition(": ")[2])
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_argument("--preset", type=str, help="Sizes of a published model. Left out: gpt2.")
    parser.add_argument("--target", type=str, default="h200", help="GPU to compile for: h200, h100 or a100.")
    parser.add_argument("--mesh", type=int | str, default=1, help="As the trainer's: 8, or data=2,fsdp=4.")
    parser.add_argument("--batch", type=int, default=32, help="Sequences a step, over all devices.")
    parser.add_argument("--accumulation", type=int, default=1, help="Parts a step is computed in.")
    parser.add_argument(
        "--attention", type=Literal["cudnn", "recompute", "xla"], default="cudnn", help="The attention kernel."
    )
    parser.add_argument("--norm_kernel", type=Literal["triton", "xla"], default="triton", help="The layer norm kernel.")
    parser.add_argument(
        "--gradient_exchange",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="Dtype in which devices exchange gradients.",
    )
    parser.add_argument("--scan_layers", type=bool, default=False, help="Scan the layers.")
    parser.add_argument("--remat", type=bool, default=False, help="Recompute activations.")
    parser.add_argument(
        "--flag", action="append", type=str, help="--flag=--xla_...: one more flag for XLA; repeatable."
    )
    parser.add_argument("--top", type=int, default=25, help="How many of the largest groups to print.")
    parser.add_argument("--hlo", type=str, help="File to write the program's text to.")
    parser.add_argument("--read", type=str, help="Analyse the program in this file; compile nothing.")
    parser.add_argument("--json", type=str, help="File to write everything to, with command, machine and versions.")
    parser.add_argument(
        "--against", type=str, help="Show the differences from the results in this file, which --json wrote."
    )
    return parser
