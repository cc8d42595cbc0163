"""gpt2 plan: memory, arithmetic and exchange of a training on a mesh of GPUs, and which mesh to use."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from gpt2_core.cli import Parser, parse_train_config, with_sizes
from gpt2_core.config import PRESETS, ModelConfig, TrainConfig, recipes
from gpt2_core.config.checks import refuse_unless, require_positive
from gpt2_core.errors import UserError
from gpt2_core.files import write_atomically
from gpt2_core.runs.summary import training_bytes
from gpt2_jax.mesh import format_mesh, parse_mesh
from gpt2_jax.planning import gpus
from gpt2_jax.planning.meshes import USABLE, Cluster, Plan, best_plan, largest_device_batch, plan

_LEFT_OUT = (
    "Times are lower bounds: of matrix products and attention at the rates that these GPUs attain, and of the bytes "
    "that a device sends. Left out: kernels bound by memory (a quarter of a step at 124M parameters), launches, the "
    "latency of collectives."
)

_HELD = {
    "parameters": "parameters",
    "optimizer": "optimizer's moments",
    "gradients": "gradients, beyond the activations whose place they take",
    "weights": "weights as they are multiplied",
    "activations": "activations",
    "logits": "logits of a chunk, the head's gradient",
}


# A step of a configuration, compiled for the GPU of this name, that says how many bytes it needs.
Compiler = Callable[[TrainConfig, str, Sequence[str], Console], Any]


def main(arguments: list[str], command: str = "gpt2 plan", compiler: Compiler | None = None) -> None:
    """`compiler` is what the option --compiled, which there is only with it, compiles by: a clone has one."""
    made = parser(command)
    if compiler is not None:
        made.add_argument(
            "--compiled",
            type=bool,
            default=False,
            help="Compile the step of --mesh for the target and show its memory beside the formula's; makes an "
            "environment of 0.5 GB once.",
        )
    options = made.parse(with_sizes(arguments, PRESETS["gpt2"]))
    if options.recipes:
        console = Console(markup=False, width=max(120, Console(markup=False).width))
        rows = recipe_rows()
        console.print(_table("the recipes", RECIPE_COLUMNS, rows))
        console.print(_LEFT_OUT)
        if options.json is not None:
            _write(options.json, {"columns": RECIPE_COLUMNS, "recipes": rows})
        return
    require_positive("", options, "batch_tokens", "devices_per_node", "interconnect")
    config = _configuration(options)
    cluster = Cluster(gpus.load(options.target), options.devices_per_node, options.interconnect * 1e9)
    counts = _counts(options.devices)
    asked = None if options.mesh is None else _plan_of(options.mesh, config, cluster)
    console = Console(markup=False, soft_wrap=True, highlight=False, width=max(120, Console(markup=False).width))
    results: dict[str, Any] = {"config": dataclasses.asdict(config), "target": cluster.gpu.name}
    console.print(
        f"{config.model.parameter_count:,} parameters, {config.batch_size} x {config.tokens_per_sequence} tokens a "
        f"step, on {cluster.gpu.name} ({_gb(USABLE * cluster.gpu.memory)} usable), {options.devices_per_node} a node; "
        f"{options.interconnect:g} GB/s from each device to other nodes"
    )
    if asked is not None:
        results["mesh"] = _show_mesh(console, config, asked, cluster, options, compiler)
    found = {devices: best_plan(config, devices, cluster) for devices in counts}
    console.print(_table_of_meshes(found))
    results["chosen"] = {n: None if one is None else _facts(one) for n, one in found.items()}
    console.print(_LEFT_OUT)
    if options.json is not None:
        _write(options.json, {"command": shlex.join([*command.split(), *arguments]), "results": results})


def _write(path: str, written: dict[str, Any]) -> None:
    try:
        write_atomically(Path(path), json.dumps(written, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: can't be written ({error.strerror})") from error


def _configuration(options: Any) -> TrainConfig:
    model = ModelConfig(**{f.name: options.model[f.name] for f in dataclasses.fields(ModelConfig)})
    refuse_unless(
        model.dropout == 0 and model.position != "alibi",
        "--model: is planned for cuDNN's attention, which has no dropout and no alibi; leave them out",
    )
    return TrainConfig(
        model=model,
        batch_tokens=options.batch_tokens,
        precision="bfloat16",
        remat=options.remat,
        gradient_exchange=options.gradient_exchange,
    )


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1 << 20 for part in parts):
        raise UserError(f"--devices {text}: expected numbers of devices, comma between (1,8,64)")
    return [int(part) for part in parts]


def _plan_of(mesh: str, config: TrainConfig, cluster: Cluster) -> Plan:
    found = plan(config, parse_mesh(mesh), cluster)
    if found is None:
        raise UserError(
            f"--mesh {mesh}: not even one sequence fits on a device; use more fsdp or tensor, or --remat true"
        )
    return found


def _show_mesh(
    console: Console,
    config: TrainConfig,
    found: Plan,
    cluster: Cluster,
    options: Any,
    compiler: Compiler | None,
) -> Any:
    mesh = found.mesh
    largest = largest_device_batch(config, mesh, found.accumulation > 1, cluster.gpu)
    facts = _facts(found) | {"largest_device_batch": largest}
    rows = [(_HELD[name], _gb(size)) for name, size in dataclasses.asdict(found.memory).items()]
    rows.append(("together", _gb(found.memory.total)))
    if compiler is not None and options.compiled:
        step = dataclasses.replace(
            config,
            batch_tokens=None,
            batch_size=found.batch_size,
            accumulation=found.accumulation,
            mesh=format_mesh(mesh),
            attention="cudnn",
            norm_kernel="triton",
        )
        program = compiler(step, options.target, [], console)
        facts["compiled_bytes"] = program.argument_bytes + program.temp_bytes
        rows.append(("by the compiled program", _gb(facts["compiled_bytes"])))
    console.print(
        f"--mesh {format_mesh(mesh)} --batch_size {found.batch_size} --accumulation {found.accumulation}: "
        f"{found.device_batch} sequences on a device at once; {largest} would fit"
    )
    console.print(_table("memory of a device", ("", "GB"), rows))
    rows = [(e.axis, e.what, f"{e.bytes / 1e6:,.0f}", f"{1e3 * e.seconds:.2f}") for e in found.exchanges]
    if rows:
        console.print(_table("exchanged in a step", ("axis", "", "MB sent by a device", "least ms"), rows))
    console.print(
        f"{found.flops * found.devices / 1e15:.2f} PFLOP a step: at least {1e3 * found.compute_seconds:.1f} ms on "
        f"{found.devices} devices, {1e3 * found.seconds:.1f} ms with what of the exchange can't be hidden"
    )
    return facts


def _table_of_meshes(found: dict[int, Plan | None]) -> Table:
    rows = []
    for devices, one in found.items():
        if one is None:
            rows.append((str(devices), "none: the batch can't be split, or not even one sequence fits", *[""] * 5))
            continue
        rate = one.batch_size / one.seconds
        memory, least = _gb(one.memory.total), f"{1e3 * one.seconds:.1f}"
        exposed = f"{1e3 * (one.seconds - one.compute_seconds):.1f}"
        mesh = ",".join(f"{axis}={n}" for axis, n in one.mesh.items() if n > 1) or "1"
        rows.append(
            (str(devices), mesh, f"{one.device_batch} x {one.accumulation}", memory, least, exposed, f"{rate:,.0f}")
        )
    columns = (
        "devices",
        "mesh",
        "sequences at once x parts",
        "GB",
        "least ms",
        "of it exchange",
        "sequences/s at most",
    )
    return _table("the mesh to use", columns, rows)


RECIPE_COLUMNS = ("recipe", "state, GB", "at once on an A100", "H100", "H200", "least time, one H200", "eight")


def recipe_rows() -> list[tuple[str, ...]]:
    """Of each recipe its training state, and where it is planned for cuDNN's attention, which has no dropout: how many
    sequences of a step fit on a GPU (of 80, 80 and 141 GB) at once, and the least time of the whole run."""
    rows, clusters = [], [Cluster(gpus.load(name), 8, 50e9) for name in ("a100", "h100", "h200")]
    for name in recipes.names():
        line = ["--config", name, "--precision", "bfloat16"]
        config = parse_train_config(line, command="gpt2 plan", framework="JAX", elsewhere={})
        state = f"{training_bytes(config) / 1e9:.2g}"
        if config.model.dropout or config.model.position == "alibi":
            rows.append((f"`{name}`", state, *["-"] * 5))
            continue
        config = dataclasses.replace(config, batch_tokens=None, device_batch_size=None, accumulation=1)
        most = [largest_device_batch(config, parse_mesh(1), True, cluster.gpu) for cluster in clusters]
        plans = [best_plan(config, devices, clusters[-1]) for devices in (1, 8)]
        whole = config.batch_size
        fitting = [f"all {whole}" if n >= whole else f"{n} of {whole}" for n in most]
        times = [_duration(config.steps * one.seconds) if one else "doesn't fit" for one in plans]
        rows.append((f"`{name}`", state, *fitting, *times))
    return rows


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:,.2g} {unit}" if seconds < 100 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds >= 1 else "under a second"


def _facts(found: Plan) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"memory_bytes": found.memory.total, "seconds": found.seconds}


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def parser(command: str) -> Parser:
    made = Parser(prog=command, description=__doc__.partition(": ")[2])
    made.add_class_arguments(ModelConfig, "model")
    made.add_argument("--preset", type=str, help="Sizes of a published model. Left out: gpt2.")
    made.add_argument("--batch_tokens", type=int, default=524288, help="Tokens a step, over all devices.")
    made.add_argument("--mesh", type=int | str | None, help="A mesh to look at: 8, or data=8,fsdp=8.")
    made.add_argument("--devices", type=str, default="1,8,64,512", help="Numbers of devices to choose a mesh for.")
    made.add_argument("--target", type=str, default="h200", help="The GPU: h200, h100 or a100.")
    made.add_argument("--devices_per_node", type=int, default=8, help="GPUs that NVLink connects.")
    made.add_argument(
        "--interconnect", type=float, default=50.0, help="GB/s from a device to other nodes (400 Gbit/s: 50)."
    )
    made.add_argument("--remat", type=bool, default=False, help="Recompute activations.")
    made.add_argument(
        "--gradient_exchange",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="Dtype in which devices exchange gradients.",
    )
    made.add_argument(
        "--recipes", type=bool, default=False, help="Print what each recipe takes on one GPU and on eight, instead."
    )
    made.add_argument("--json", type=str, help="File to write everything to, with the command.")
    return made
