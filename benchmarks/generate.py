"""bench.py generate: prefill and decoding, with and without a KV cache, against the reference and transformers.

All sides have the same random weights, device and precision, and decode greedily, so that no time goes into sampling.

Shapes: B prompts of P tokens, each continued by N.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Session, interleave_works, positive, ratio, sides, write_json
from gpt2_core.cli import Parser
from gpt2_core.config import ModelConfig, dtype_of
from gpt2_core.config.io import model_from_dict
from gpt2_core.errors import UserError
from gpt2_core.sampling import Sampling

SIDES = {
    "jax": ("benchmarks.generate:jax_session", {}),
    "jax, no cache": ("benchmarks.generate:jax_uncached_session", {}),
    "torch reference, no cache": ("benchmarks.generate:torch_session", {}),
    "transformers": ("benchmarks.generate:transformers_session", {"cache": True}),
    "transformers, no cache": ("benchmarks.generate:transformers_session", {"cache": False}),
}


def main(arguments: list[str]) -> None:
    options = _parser().parse(arguments)
    positive(options, "prompt", "rounds")
    if options.tokens < 2:
        raise UserError(f"--tokens {options.tokens}: must be 2 or more; the first token is the prefill's")
    model = ModelConfig(**{f.name: options.model[f.name] for f in dataclasses.fields(ModelConfig)})
    batches = [_number(text) for text in options.batch.split(",")]
    if options.prompt + options.tokens > model.block_size:
        raise UserError(
            f"--prompt {options.prompt} and --tokens {options.tokens}: more than model.block_size {model.block_size}"
        )
    uncached = min(5, options.tokens) if options.uncached_tokens is None else options.uncached_tokens
    if not 2 <= uncached <= options.tokens:
        raise UserError(f"--uncached_tokens {uncached}: must be 2 to {options.tokens}, which is --tokens")
    chosen = options.sides.split(";") if options.sides else list(SIDES)
    for name in chosen:
        if name not in SIDES:
            raise UserError(f"--sides {name}: no such side; use {'; '.join(SIDES)}")
    console = Console(markup=False, soft_wrap=True, highlight=False)
    found = []
    for batch in batches:
        spec = {"model": dataclasses.asdict(model), "batch": batch, "prompt": options.prompt}
        spec |= {"device": options.device, "precision": options.precision}
        spec |= {"tokens": options.tokens, "uncached_length": options.prompt + uncached}
        tokens = {name: uncached if name.endswith("no cache") else options.tokens for name in chosen}
        functions = {name: (SIDES[name][0], spec | SIDES[name][1]) for name in chosen}
        with sides(functions, console) as started:
            # A unit is a generated token, and each piece of work a prefill too: prefill alone is the work of one unit.
            first, both = interleave_works(started, rounds=options.rounds, works=[1, tokens], console=console)
            facts = {name: side.facts for name, side in started.items()}
        seconds = {
            name: {
                "prefill": first[name],
                "decode": [
                    (whole * tokens[name] - prefill) / (tokens[name] - 1)
                    for whole, prefill in zip(both[name], first[name], strict=True)
                ],
            }
            for name in chosen
        }
        for name in chosen:
            row = _row(name, batch, seconds, options.prompt)
            numbers = numbers_read(model, batch, options.prompt + tokens[name] // 2)
            share = row["decode"] and _bandwidth_share(row["decode"] / batch, numbers, facts[name])
            found.append(row | {"facts": facts[name], "bandwidth_share": share})
    table = Table("side", "batch", "prefill, tokens/s", "decode, tokens/s", "over transformers", "decode", "of memory")
    for row in found:
        compared = (str(row[f"{what}_ratio"] or "") for what in ("prefill", "decode"))
        share = "" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.0%}"
        rates = (f"{row['prefill']:,.0f}", "" if row["decode"] is None else f"{row['decode']:,.1f}")
        table.add_row(row["side"], str(row["batch"]), *rates, *compared, share)
    facts = found[0]["facts"]
    console.print(
        f"{model.parameter_count:,} parameters on {facts['device']} in {facts['precision']}, prompts of "
        f"{options.prompt} tokens, {options.tokens} more"
    )
    console.print(table)
    console.print("of memory: share of the time that reading the weights and the cache once for each token takes")
    for row in found:
        if row["decode"] is None:
            console.print(
                f"{row['side']}, batch {row['batch']}: {tokens[row['side']] - 1} tokens after the prefill take less "
                "time than the prefill varies by, so there is no rate of decoding; give more --tokens, or more "
                "--uncached_tokens"
            )
    results = [
        {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in row.items()} for row in found
    ]
    write_json(options.json, ["generate", *arguments], {"model": dataclasses.asdict(model), "sides": results})


def numbers_read(model: ModelConfig, batch: int, length: int) -> int:
    """Numbers that a step of decoding must read: all weights but the embeddings', and the cache of `length` positions.
    (Tied token embeddings are read: they are the head.)"""
    tables = model.block_size * model.n_embd if model.position == "learned" else 0
    tables += 0 if model.tie_embeddings else model.vocab_size * model.n_embd
    return model.parameter_count - tables + batch * 2 * model.n_layer * length * model.n_embd


def jax_session(spec: dict[str, Any]) -> Session:
    """JAX with its KV cache, as generate.py computes."""
    params, definition, prompts, facts = _jax(spec)
    from gpt2_jax.generate import Generator

    generator = Generator(definition)

    def work(tokens: int) -> None:
        uniforms = np.zeros((spec["batch"], tokens))
        for _ in generator(params, prompts, uniforms, Sampling(greedy=True)):
            pass

    work(spec["tokens"])  # compiles what so many tokens take: prefill, and decoding for each size of the cache
    return Session(facts, work)


def jax_uncached_session(spec: dict[str, Any]) -> Session:
    """JAX recomputing everything for every token, at a constant length, since each length would be compiled."""
    params, definition, prompts, facts = _jax(spec)
    import jax
    import jax.numpy as jnp

    @jax.jit
    def following(params, tokens_BT, length):
        model = definition.merge(params)
        x_B1D = jax.lax.dynamic_slice_in_dim(model.hidden(tokens_BT), length - 1, 1, axis=1)
        return jnp.argmax(model.logits(x_B1D)[:, 0], axis=-1)

    def work(tokens: int) -> None:
        ids = np.zeros((spec["batch"], spec["uncached_length"]), np.int32)
        ids[:, : spec["prompt"]] = prompts
        for length in range(spec["prompt"], spec["prompt"] + tokens):
            ids[:, length] = np.asarray(following(params, ids, length))

    return Session(facts, work)


def torch_session(spec: dict[str, Any]) -> Session:
    """The reference, which has no cache: a token recomputes its whole context."""
    from gpt2_torch.generate import generate
    from gpt2_torch.weights import build

    device, precision, facts = _torch(spec)
    model = build(_weights(spec).astype(np.float64 if precision == "float64" else np.float32)).to(device)

    def work(tokens: int) -> None:
        import torch

        uniforms = np.zeros((spec["batch"], tokens))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for _ in generate(model, _prompts(spec), uniforms, Sampling(greedy=True)):
                pass

    return Session(facts, work)


def transformers_session(spec: dict[str, Any]) -> Session:
    """transformers' GPT2LMHeadModel, called as its generate() calls it, without generate()'s own overhead."""
    import torch

    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers isn't installed: pip install transformers, or choose other --sides") from error
    device, precision, facts = _torch(spec)
    from gpt2_convert import write_weights

    with tempfile.TemporaryDirectory() as folder:
        write_weights(_weights(spec), Path(folder) / "m", "hf")
        model = transformers.GPT2LMHeadModel.from_pretrained(
            Path(folder) / "m", dtype=getattr(torch, dtype_of(precision))
        )
    model = model.eval().to(device)
    prompts = torch.tensor(_prompts(spec), device=device)

    @torch.inference_mode()
    def work(tokens: int) -> None:
        ids, past = prompts, None
        for _ in range(tokens):
            given = ids if past is None else ids[:, -1:]
            out = model(given, past_key_values=past, use_cache=spec["cache"], logits_to_keep=1)
            past = out.past_key_values if spec["cache"] else None
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
        ids.tolist()  # a GPU is done when its tokens are here

    return Session(facts, work)


def _jax(spec: dict[str, Any]):
    import jax

    if spec["device"] == "cpu":
        jax.config.update("jax_platforms", "cpu")
    from gpt2_jax.definition import define
    from gpt2_jax.model import Execution
    from gpt2_jax.runtime import configure, has_accelerator, resolve_precision
    from gpt2_jax.weights import from_canonical

    configure(spec["precision"], 1)
    if spec["device"] == "cuda" and not has_accelerator():
        raise UserError("--device cuda: JAX finds no GPU here; use --device cpu")
    precision = resolve_precision(spec["precision"])
    definition = define(model_from_dict(spec["model"], "--model"), Execution(dtype_of(precision)))
    params = jax.device_put(from_canonical(_weights(spec), definition.execution.param_dtype))
    facts = {"device": jax.devices()[0].device_kind, "precision": precision, "bandwidth": _bandwidth()}
    return params, definition, _prompts(spec), facts


def _torch(spec: dict[str, Any]):
    import torch

    from gpt2_torch.runtime import pick_device, resolve_precision, set_matmul_precision

    device = pick_device(spec["device"])
    precision = resolve_precision(spec["precision"], device)
    set_matmul_precision(precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return device, precision, {"device": name, "precision": precision, "bandwidth": None}


def _bandwidth() -> float:
    """Bytes a second at which the device reads a matrix that exceeds its caches, in a product with a vector."""
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((1 << 14, 1 << 14)), jnp.ones(1 << 14)
    product = jax.jit(jnp.dot)
    product(matrix, vector).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        product(matrix, vector).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return matrix.nbytes / min(seconds)


def _weights(spec: dict[str, Any]):
    from parity.gpt2.cases import random_weights

    return random_weights(model_from_dict(spec["model"], "--model"))


def _prompts(spec: dict[str, Any]) -> list[list[int]]:
    shape = (spec["batch"], spec["prompt"])
    return np.random.default_rng(0).integers(0, spec["model"]["vocab_size"], shape).tolist()


def _row(name: str, batch: int, seconds: dict[str, dict[str, list[float]]], prompt: int) -> dict[str, Any]:
    """Rates of one side, and its speed over that of transformers with its cache.

    Decoding's time is a difference of two times; if it isn't above zero in some round, noise is larger and there is no
    rate.
    """
    tokens = {"prefill": batch * prompt, "decode": batch}
    row: dict[str, Any] = {"side": name, "batch": batch}
    for what, count in tokens.items():
        ours, theirs = seconds[name][what], seconds.get("transformers", {}).get(what)
        row[what] = count / statistics.median(ours) if min(ours) > 0 else None
        row[f"{what}_ratio"] = ratio(ours, theirs) if theirs and min(*ours, *theirs) > 0 else None
    return row


def _bandwidth_share(steps_per_second: float, numbers: int, facts: dict[str, Any]) -> float | None:
    """Share of the time that reading so many numbers a step from memory takes; None if the bandwidth isn't known."""
    itemsize = {"bfloat16": 2, "float32": 4, "float64": 8}[dtype_of(facts["precision"])]
    return facts["bandwidth"] and steps_per_second * numbers * itemsize / facts["bandwidth"]


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch {text}: expected comma-separated positive integers")
    return int(text)


def _parser() -> Parser:
    parser = Parser(prog="bench.py generate", description=__doc__.splitlines()[0].partition(": ")[2])
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_argument("--batch", type=str, default="1,32", help="Comma-separated numbers of prompts at once.")
    parser.add_argument("--prompt", type=int, default=128, help="Tokens of a prompt.")
    parser.add_argument("--tokens", type=int, default=65, help="Tokens to generate; the first is the prefill's.")
    parser.add_argument(
        "--uncached_tokens",
        type=int,
        help="As --tokens, for sides without a cache, where each token costs a prefill. Left out: 5, or --tokens if "
        "that is less.",
    )
    parser.add_argument(
        "--sides", type=str, help=f"Some of {'; '.join(SIDES)}; separated by semicolons. Left out: all."
    )
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Device of all sides.")
    parser.add_argument(
        "--precision",
        type=Literal["auto", "float32", "tf32", "bfloat16", "float64"],
        default="auto",
        help="As the trainers': auto is bfloat16 on an accelerator and float32 on CPU.",
    )
    parser.add_argument("--rounds", type=int, default=5, help="Rounds, in each of which every side is measured.")
    parser.add_argument("--json", type=str, help="File to write the results to, with command, machine and versions.")
    return parser
