"""bench.py train: a train step of both frameworks, side by side, with the trainers' own functions."""

import dataclasses
import math
import shutil
import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import JaxTraining, TorchTraining, add_json, add_options, configuration
from benchmarks.measure import Session, interleave, positive, ratio, sides, write_json
from benchmarks.rates import jax_matmul, torch_matmul
from gpt2_core.cli import Parser, with_sizes
from gpt2_core.config import PRESETS, TrainConfig
from gpt2_core.config.io import from_dict
from gpt2_core.errors import UserError
from gpt2_core.memory import peak_memory
from gpt2_core.runs.log import peak_flops


def main(arguments: list[str]) -> None:
    options = _parser().parse(with_sizes(arguments, PRESETS["gpt2"]))
    positive(options, "batch", "rounds", "steps")
    config = configuration(options)
    console = Console(markup=False, soft_wrap=True, highlight=False)
    functions = {name: (function, spec | {"config": dataclasses.asdict(config)})
                 for name, function, spec in _sides(options.frameworks, options.device)}  # fmt: skip
    rows, seconds = measure(functions, config, rounds=options.rounds, steps=options.steps, console=console)
    _show(console, rows, config)
    ratios = _ratios(seconds)
    for pair, value in ratios.items():
        console.print(f"{pair}: {value} times as fast; median and middle half of {options.rounds} rounds")
    found = {"config": dataclasses.asdict(config), "sides": rows, "seconds_a_step": seconds,
             "ratios": {pair: dataclasses.asdict(value) for pair, value in ratios.items()}}  # fmt: skip
    write_json(options.json, ["train", *arguments], found)


def measure(
    functions: dict[str, tuple[str, dict[str, Any]]], config: TrainConfig, *, rounds: int, steps: int, console: Console
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """A row of results for each side, and its seconds a step, one value for each round; all sides train `config`."""
    with sides(functions, console) as started:
        seconds = interleave(started, rounds=rounds, units=steps, console=console)
        facts = {name: side.facts | side.end() for name, side in started.items()}
    return [_row(name, seconds[name], facts[name], config) for name in started], seconds


def _sides(frameworks: str, device: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, function and settings of each side. On a CPU PyTorch runs eager and compiled, and the faster one counts."""
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
            raise UserError(f"--frameworks {frameworks}: unknown framework {name!r}; use jax, torch or jax,torch")
    return chosen


def _on_gpu(device: str) -> bool:
    if device == "cpu":
        return False
    import torch

    return torch.cuda.is_available()


def jax_session(spec: dict[str, Any]) -> Session:
    training = JaxTraining(from_dict(spec["config"]), cached=spec.get("cached", False))
    from gpt2_jax.memory import bytes_needed

    device, config = training.program.mesh.devices.flat[0], training.config
    facts = {
        "device": device.device_kind,
        "precision": config.precision,
        "compile_seconds": training.compile_seconds,
        "kernels": f"{config.attention} attention, {config.norm_kernel} layer norm, fused head and loss",
        "matmul_flops": jax_matmul(config.precision, device.platform),
        "step_bytes": bytes_needed(training.step),
    }

    def end() -> dict[str, Any]:
        memory = device.memory_stats() or {}
        return {"peak_bytes": memory.get("peak_bytes_in_use", peak_memory())}

    return Session(facts, training.work, end)


def torch_session(spec: dict[str, Any]) -> Session:
    attention = spec.get("attention", "auto")
    training = TorchTraining(from_dict(spec["config"]), compile=spec["compile"], attention=attention)
    import torch

    from gpt2_torch.memory import bytes_needed

    config, device = training.config, training.device
    cuda = device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "precision": config.precision,
        "compile_seconds": training.compile_seconds,
        "kernels": f"scaled_dot_product_attention ({attention}), F.cross_entropy",
        "matmul_flops": torch_matmul(config.precision, device),
    }

    def end() -> dict[str, Any]:
        if cuda:
            peak = torch.cuda.max_memory_allocated()
            return {"peak_bytes": peak, "step_bytes": peak}
        planned = bytes_needed(config, device.type, config.microbatch_size, config.accumulation)
        return {"peak_bytes": peak_memory(), "step_bytes": planned}

    return Session(facts, training.work, end)


def _row(name: str, seconds: list[float], facts: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    step = statistics.median(seconds)
    rate = config.tokens_per_step / step
    flops = rate * config.training_flops_per_token
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
    """JAX's speed over that of the faster PyTorch, if both frameworks ran."""
    theirs = [name for name in seconds if name.startswith("torch")]
    if "jax" not in seconds or not theirs:
        return {}
    best = min(theirs, key=lambda name: statistics.median(seconds[name]))
    return {f"jax over {best}": ratio(seconds["jax"], seconds[best])}


def _show(console: Console, rows: list[dict[str, Any]], config: TrainConfig) -> None:
    model = config.model
    console.print(
        f"{model.parameter_count:,} parameters, {model.n_layer} layers x {model.n_embd}, vocabulary "
        f"{model.vocab_size}, batch {config.batch_size} x {config.tokens_per_sequence}; "
        f"{config.training_flops_per_token / 1e6:,.0f} MFLOP a token (6 N + 12 L T D)"
    )
    table = Table("", *(row["side"] for row in rows))
    for label, key, form in (
        ("tokens/s", "tokens_per_second", lambda x: f"{x:,.0f}"),
        ("step", "step_seconds", lambda x: f"{1e3 * x:,.1f} ms"),
        ("FLOP/s", "flops", lambda x: f"{x / 1e12:,.2f} T"),
        ("a large matrix product's FLOP/s", "matmul_flops", lambda x: f"{x / 1e12:,.2f} T"),
        ("share of that", "share_of_measured_matmul", lambda x: f"{x:.0%}"),
        ("MFU (datasheet's dense peak)", "mfu", lambda x: "unknown" if x is None or math.isnan(x) else f"{x:.1%}"),
        ("compile", "compile_seconds", lambda x: f"{x:.1f} s"),
        ("start to first step", "seconds_to_first_unit", lambda x: f"{x:.1f} s"),
        ("peak memory", "peak_bytes", lambda x: f"{x / 1e9:.2f} GB"),
        ("of that a step's arrays", "step_bytes", lambda x: f"{x / 1e9:.2f} GB"),
        ("precision", "precision", str),
        ("kernels", "kernels", str),
        ("device", "device", str),
    ):
        table.add_row(label, *(form(row[key]) for row in rows))
    console.print(table)


def _parser() -> Parser:
    parser = Parser(prog="bench.py train", description="A train step of both frameworks, side by side.")
    add_options(parser, preset="gpt2", batch=32)
    add_json(parser)
    parser.add_argument("--frameworks", type=str, default="jax,torch", help="Which to measure: jax, torch or both.")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds, in each of which every side is measured.")
    parser.add_argument("--steps", type=int, default=5, help="Steps in a round.")
    return parser
