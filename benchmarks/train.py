"""bench.py train: a train step of both frameworks, side by side, with the trainers' own functions."""

import dataclasses
import math
import resource
import shutil
import statistics
import sys
import time
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Session, interleave, positive, ratio, sides, write_json
from gpt2_core.batches import Batch
from gpt2_core.cli import Parser
from gpt2_core.config import PRESETS, ModelConfig, TrainConfig, from_dict
from gpt2_core.errors import UserError
from gpt2_core.runlog import peak_flops

_RATE = 1e-4
# Side of the square matrices whose product shows what a device reaches: large enough to fill it.
_MATMUL = {"cpu": 2048, "gpu": 8192}


def main(arguments: list[str]) -> None:
    options = _parser().parse(_with_preset(arguments))
    positive(options, "batch", "rounds", "steps")
    model = ModelConfig(**{f.name: options.model[f.name] for f in dataclasses.fields(ModelConfig)})
    config = TrainConfig(
        model=model,
        batch_size=options.batch,
        accumulation=options.accumulation,
        precision=options.precision,
        mesh=1,
        attention=options.attention,
        scan_layers=options.scan_layers,
        remat=options.remat,
        device=options.device,
    )
    console = Console(soft_wrap=True, highlight=False)
    functions = {name: (function, spec | {"config": dataclasses.asdict(config)})
                 for name, function, spec in _sides(options.frameworks, options.device)}  # fmt: skip
    with sides(functions, console) as started:
        seconds = interleave(started, rounds=options.rounds, units=options.steps, console=console)
        facts = {name: side.facts | side.end() for name, side in started.items()}
    rows = [_row(name, seconds[name], facts[name], config) for name in started]
    _show(console, rows, config)
    ratios = _ratios(seconds)
    for pair, value in ratios.items():
        console.print(f"{pair}: {value} times as fast; median and middle half of {options.rounds} rounds")
    found = {"config": dataclasses.asdict(config), "sides": rows, "seconds_a_step": seconds,
             "ratios": {pair: dataclasses.asdict(value) for pair, value in ratios.items()}}  # fmt: skip
    write_json(options.json, ["train", *arguments], found)


def _sides(frameworks: str, device: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, function and settings of each side. On a CPU PyTorch runs as it is and compiled, and the better counts."""
    chosen: list[tuple[str, str, dict[str, Any]]] = []
    for name in frameworks.split(","):
        if name == "jax":
            chosen.append(("jax", "benchmarks.train:jax_session", {}))
        elif name == "torch":
            if not _on_gpu(device):
                chosen.append(("torch, eager", "benchmarks.train:torch_session", {"compile": False}))
            if _on_gpu(device) or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
                chosen.append(("torch, compiled", "benchmarks.train:torch_session", {"compile": True}))
            else:
                print("torch.compile needs a C++ compiler on a CPU, and there is none: eager only", file=sys.stderr)
        else:
            raise UserError(f"--frameworks {frameworks}: {name!r} is none; use jax, torch or jax,torch")
    return chosen


def _on_gpu(device: str) -> bool:
    if device == "cpu":
        return False
    import torch

    return torch.cuda.is_available()


def jax_session(spec: dict[str, Any]) -> Session:
    config = from_dict(spec["config"])
    import jax

    if config.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    from gpt2_jax.runtime import configure, has_accelerator

    configure(config.precision, config.mesh)
    jax.config.update("jax_enable_compilation_cache", False)  # or the time to compile would be the time to load
    if config.device == "cuda" and not has_accelerator():
        raise UserError("--device cuda: JAX finds no GPU here; use --device cpu")
    from gpt2_core.config import parse_mesh
    from gpt2_jax.sharding import make_mesh
    from gpt2_jax.train import define_model, new_state, resolve
    from gpt2_jax.train_step import make_train_step, put_batch

    config = resolve(config)
    mesh = make_mesh(parse_mesh(config.mesh))
    jax.set_mesh(mesh)
    definition = define_model(config)
    state = new_state(config, definition, mesh, None)
    batch = put_batch(_batch(config), config.accumulation, mesh)
    rate = np.asarray(_RATE, definition.execution.param_dtype)
    begin = time.perf_counter()
    step = make_train_step(definition, config, mesh).lower(state, *batch, rate).compile()
    compiled_in = time.perf_counter() - begin
    metrics = None

    def work(steps: int) -> float:
        nonlocal state, metrics
        for _ in range(steps):
            state, metrics = step(state, *batch, rate)
        return float(metrics.loss)

    device = jax.devices()[0]
    facts = {
        "device": device.device_kind,
        "precision": config.precision,
        "compile_seconds": compiled_in,
        "kernels": f"{config.attention} attention, fused head and loss",
        "matmul_flops": _jax_matmul(config.precision, device.platform),
        "step_temporary_bytes": step.memory_analysis().temp_size_in_bytes,
    }

    def end() -> dict[str, Any]:
        memory = device.memory_stats() or {}
        return {"peak_bytes": memory.get("peak_bytes_in_use", _resident())}

    return Session(facts, work, end)


def torch_session(spec: dict[str, Any]) -> Session:
    config = from_dict(spec["config"])
    import torch

    from gpt2_torch.model import GPT2
    from gpt2_torch.optimizer import make_optimizer
    from gpt2_torch.train import pick_device, resolve, train_step

    device = pick_device(config.device)
    config = dataclasses.replace(resolve(config, device, 1), compile=spec["compile"])
    torch.manual_seed(0)
    model = GPT2(config.model).to(device, torch.float64 if config.precision == "float64" else torch.float32)
    optimizer = make_optimizer(model, config.optimizer)
    run = torch.compile(model) if config.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    batch = [torch.from_numpy(part).to(device, torch.long) for part in _batch(config)]

    def work(steps: int) -> float:
        for _ in range(steps):
            loss, _ = train_step(
                run,
                optimizer,
                *batch,
                learning_rate=_RATE,
                clip_norm=config.optimizer.clip_norm,
                accumulation=config.accumulation,
                autocast=autocast,
            )
        return loss.item()

    begin = time.perf_counter()
    work(1)
    cuda = device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "precision": config.precision,
        "compile_seconds": time.perf_counter() - begin if config.compile else 0.0,
        "kernels": "scaled_dot_product_attention, F.cross_entropy",
        "matmul_flops": _torch_matmul(config.precision, device),
    }
    return Session(facts, work, lambda: {"peak_bytes": torch.cuda.max_memory_allocated() if cuda else _resident()})


def _batch(config: TrainConfig) -> Batch:
    shape = (config.batch_size, config.model.block_size + 1)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return Batch(ids[:, :-1], ids[:, 1:])


def _resident() -> int:
    """Largest resident set of this process, in bytes: a CPU's nearest to a device's peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _jax_matmul(precision: str, platform: str) -> float:
    """What the device reaches on a large square product, in FLOP/s."""
    import jax
    import jax.numpy as jnp

    n = _MATMUL["cpu" if platform == "cpu" else "gpu"]
    x = jnp.ones((n, n), precision)
    multiply = jax.jit(lambda a, b: a @ b)
    return _fastest(lambda: multiply(x, x).block_until_ready(), 2 * n**3)


def _torch_matmul(precision: str, device) -> float:
    import torch

    n = _MATMUL["cpu" if device.type == "cpu" else "gpu"]
    x = torch.ones((n, n), dtype=getattr(torch, precision), device=device)

    def multiply() -> None:
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()

    return _fastest(multiply, 2 * n**3)


def _fastest(work, operations: int) -> float:
    work()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return operations / min(times)


def _row(name: str, seconds: list[float], facts: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    step = statistics.median(seconds)
    rate = config.tokens_per_step / step
    flops = rate * config.model.training_flops_per_token
    datasheet = peak_flops(facts["device"], facts["precision"])
    return {
        "side": name,
        "step_seconds": step,
        "tokens_per_second": rate,
        "flops": flops,
        "share_of_measured_matmul": flops / facts["matmul_flops"],
        "mfu": flops / datasheet if datasheet else None,
        "datasheet_flops": datasheet,
        **facts,
    }


def _ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """JAX against PyTorch, where both ran: against the faster of PyTorch's two."""
    theirs = [name for name in seconds if name.startswith("torch")]
    if "jax" not in seconds or not theirs:
        return {}
    best = min(theirs, key=lambda name: statistics.median(seconds[name]))
    return {f"jax over {best}": ratio(seconds["jax"], seconds[best])}


def _show(console: Console, rows: list[dict[str, Any]], config: TrainConfig) -> None:
    model = config.model
    console.print(
        f"{model.parameter_count:,} parameters, {model.n_layer} layers x {model.n_embd}, vocabulary "
        f"{model.vocab_size}, batch {config.batch_size} x {model.block_size}; "
        f"{model.training_flops_per_token / 1e6:,.0f} MFLOP a token (6 N + 12 L T D)"
    )
    table = Table("", *(row["side"] for row in rows))
    for label, key, form in (
        ("tokens/s", "tokens_per_second", lambda x: f"{x:,.0f}"),
        ("step", "step_seconds", lambda x: f"{1e3 * x:,.1f} ms"),
        ("FLOP/s", "flops", lambda x: f"{x / 1e12:,.2f} T"),
        ("a large product's FLOP/s", "matmul_flops", lambda x: f"{x / 1e12:,.2f} T"),
        ("share of that", "share_of_measured_matmul", lambda x: f"{x:.0%}"),
        ("MFU (datasheet's dense peak)", "mfu", lambda x: "unknown" if x is None or math.isnan(x) else f"{x:.1%}"),
        ("compile", "compile_seconds", lambda x: f"{x:.1f} s"),
        ("start to first step", "seconds_to_first_unit", lambda x: f"{x:.1f} s"),
        ("peak memory", "peak_bytes", lambda x: f"{x / 1e9:.2f} GB"),
        ("precision", "precision", str),
        ("kernels", "kernels", str),
        ("device", "device", str),
    ):
        table.add_row(label, *(form(row[key]) for row in rows))
    console.print(table)


def _with_preset(arguments: list[str]) -> list[str]:
    """`--preset` in the place of the sizes it stands for, which options on the line overrule."""
    rest, preset = [], "gpt2"
    queue = list(arguments)
    while queue:
        option, equals, value = queue.pop(0).partition("=")
        if option == "--preset":
            preset = value if equals or not queue else queue.pop(0)
        else:
            rest.append(option + equals + value)
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: no such preset; use {', '.join(PRESETS)}")
    return [*(f"--model.{name}={value}" for name, value in PRESETS[preset].items()), *rest]


def _parser() -> Parser:
    parser = Parser(prog="bench.py train", description="A train step of both frameworks, side by side.")
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_argument("--preset", type=str, help="Sizes of a published model. Left out: gpt2.")
    parser.add_argument("--batch", type=int, default=32, help="Sequences a step.")
    parser.add_argument("--accumulation", type=int, default=1, help="Parts a step is computed in.")
    parser.add_argument("--frameworks", type=str, default="jax,torch", help="Which to measure: jax, torch or both.")
    parser.add_argument(
        "--precision",
        type=Literal["auto", "float32", "bfloat16", "float64"],
        default="auto",
        help="As the trainers': auto is bfloat16 on an accelerator and float32 on CPU.",
    )
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where both compute.")
    parser.add_argument("--attention", type=Literal["auto", "cudnn", "xla"], default="auto", help="JAX's kernel.")
    parser.add_argument("--scan_layers", type=bool, default=False, help="JAX: scan the layers.")
    parser.add_argument("--remat", type=bool, default=False, help="JAX: recompute activations.")
    parser.add_argument("--rounds", type=int, default=7, help="Turns that each side takes.")
    parser.add_argument("--steps", type=int, default=5, help="Steps a turn.")
    parser.add_argument("--json", type=str, help="File to write the results to, with command, machine and versions.")
    return parser
