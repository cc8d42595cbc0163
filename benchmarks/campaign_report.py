"""The results of a campaign as Markdown tables for docs/performance.md."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]

# How many of the largest kernels and groups are listed.
_TOP = 12
# How many losses of a run are listed if there are no published ones, whose steps would be used.
_POINTS = 10


def render(records: Iterable[Record]) -> str:
    """The whole report; `records` are those that benchmarks.campaign wrote for each stage, in the order of rows."""
    records = list(records)
    done = {record["stage"]: record for record in records if record["status"] == "done"}
    parts = ["# Campaign", _header(records, done), _rates(done), _steps(done), _profiles(done), _floor(done)]
    parts += [
        _variants(done, "variants", "The step in other ways"),
        _variants(done, "flags", "XLA's flags"),
        _sizes(done),
        _generation(done),
        _parity(done),
        _overfit(done),
        _not_done(records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(records: list[Record], done: dict[str, Record]) -> str:
    if not records:
        return "Nothing has been measured."
    newest = max(records, key=lambda record: record["date"])
    gpu = (done.get("environment", {}).get("results") or {}).get("gpu") or {}
    described = ", ".join(f"{name} {value}" for name, value in gpu.items())
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    lines = [
        f"{newest['date'][:10]}, commit {newest['commit'] or 'unknown'}, "
        f"Python {newest['machine']['python']}, {versions}",
        f"GPU: {described}" if described else "",
        _devices(done),
        f"`{newest['command']}`",
    ]
    return "\n\n".join(line for line in lines if line)


def _devices(done: dict[str, Record]) -> str:
    """A warning if stages ran on different devices, whose times can't be compared."""
    stages: dict[str, list[str]] = {}
    for name, record in done.items():
        results = record["results"]
        sides = [*results.get("sides", ()), *results.get("rates", {}).values(), results]
        for device in dict.fromkeys(side["device"] for side in sides if "device" in side):
            stages.setdefault(device, []).append(name)
    if len(stages) < 2:
        return ""
    return "**Measured on different devices**: " + "; ".join(f"{name}: {', '.join(on)}" for name, on in stages.items())


def _rates(done: dict[str, Record]) -> str:
    if "environment" not in done:
        return ""
    rates = done["environment"]["results"]["rates"]
    rows = [
        ["device", *(side["device"] for side in rates.values())],
        [
            "a large matrix product, TFLOP/s",
            *(f"{side['matmul_flops'] / 1e12:,.2f} ({side['precision']})" for side in rates.values()),
        ],
        ["a pass over memory, GB/s read and written", *(f"{side['bandwidth'] / 1e9:,.0f}" for side in rates.values())],
    ]
    return _section("What the device reaches", _table(["", *rates], rows))


def _steps(done: dict[str, Record]) -> str:
    """JAX beside PyTorch with each attention kernel; a row of JAX for each, since sides are measured in pairs."""
    records = _of(done, "train")
    if not records:
        return ""
    results = records[0]["results"]
    model = results["model"]
    rows = []
    for record in records:
        judged, yardstick = record["results"]["sides"]
        rows.append([f"JAX, beside {record['title']}", *_step_cells(judged), ""])
        rows.append([record["title"], *_step_cells(yardstick), _ratio(record["results"]["ratio"])])
    best = min(records, key=lambda record: record["results"]["sides"][1]["step_seconds"])
    columns = ["", "step", "tokens/s", "MFU", "peak memory", "compile, or load", "JAX over it"]
    said = (
        f"{results['parameters']:,} parameters, {model['n_layer']} layers x {model['n_embd']}, batch "
        f"{results['batch']} x {model['block_size']}, {results['sides'][0]['precision']}. JAX is "
        f"**{_ratio(best['results']['ratio'])}** times as fast as the faster PyTorch ({best['title']})."
    )
    return _section("A step", said, _table(columns, rows))


def _step_cells(side: dict[str, Any]) -> list[str]:
    mfu = "" if side["mfu"] is None else f"{side['mfu']:.1%}"
    return [_ms(1e3 * side["step_seconds"]), f"{side['tokens_per_second']:,.0f}", mfu,
            f"{side['peak_bytes'] / 1e9:.1f} GB", f"{side['compile_seconds']:.0f} s"]  # fmt: skip


def _profiles(done: dict[str, Record]) -> str:
    found = {name: done[stage]["results"] for name, stage in (("JAX", "profile-jax"), ("PyTorch", "profile-torch"))
             if stage in done}  # fmt: skip
    if not found:
        return ""
    kinds = dict.fromkeys(kind for profile in found.values() for kind in profile["kinds"])
    nothing = {"ms": 0.0, "launches": 0.0}

    def row(name: str, values: Callable[[dict[str, Any]], tuple[float, float]]) -> list[str]:
        measured = [values(profile) for profile in found.values()]
        cells = [cell for ms, launches in measured for cell in _cost({"ms": ms, "launches": launches})]
        return [name, *cells, *([f"{measured[0][0] - measured[1][0]:+.2f}"] if len(measured) > 1 else [])]

    def kind_values(kind: str) -> Callable[[dict[str, Any]], tuple[float, float]]:
        return lambda profile: tuple(profile["kinds"].get(kind, nothing)[name] for name in ("ms", "launches"))

    rows = sorted((row(kind, kind_values(kind)) for kind in kinds), key=lambda cells: -float(cells[1]))
    rows += [
        row("at least one kernel runs", lambda profile: (profile["busy_ms"], profile["launches"])),
        row("gaps", lambda profile: (profile["gaps_ms"], 0)),
        row("step, without a profiler", lambda profile: (profile["step_ms"], 0)),
    ]
    columns = ["kind", *(cell for name in found for cell in (f"{name}, ms", "launches"))]
    parts = [_table([*columns, *(["JAX - PyTorch"] if len(found) > 1 else [])], rows)]
    for name, profile in found.items():
        rows = [
            [f"`{kernel['name']}`", kernel["kind"], kernel["source"], *_cost(kernel)]
            for kernel in profile["kernels"][:_TOP]
        ]
        parts += [
            f"{name}'s longest kernels:",
            _table(["kernel", "kind", "from", "ms", "launches"], rows),
        ]
    return _section("Where a step's time goes", *parts)


def _cost(found: dict[str, float]) -> list[str]:
    return [f"{found['ms']:.2f}", f"{found['launches']:,.0f}" if found["launches"] else ""]


def _floor(done: dict[str, Record]) -> str:
    if "floor" not in done:
        return ""
    found = done["floor"]["results"]
    parts = ", ".join(f"{part} {ms:.2f}" for part, ms in found["parts_ms"].items())
    said = (
        f"The lower bound of JAX's program on this GPU is {found['floor_ms']:.2f} ms ({parts}; {found['kernels']:,} "
        f"kernels). It takes {found['step_ms']:.2f} ms: **{found['step_ms'] / found['floor_ms']:.2f}** times as long."
    )
    rows = [
        [group["source"], group["kind"], f"{group['launches']}", f"{group['ms']:.2f}"]
        for group in found["groups"][:_TOP]
    ]
    return _section("Lower bound", said, _table(["operation", "kind", "launches", "at least, ms"], rows))


def _variants(done: dict[str, Record], group: str, title: str) -> str:
    rows = []
    for record in _of(done, group):
        judged, default = record["results"]["sides"]
        rows.append([record["title"], _ms(1e3 * judged["step_seconds"]), _ms(1e3 * default["step_seconds"]),
                     _ratio(record["results"]["ratio"]), f"{judged['peak_bytes'] / 1e9:.1f} GB",
                     f"{default['peak_bytes'] / 1e9:.1f} GB"])  # fmt: skip
    if not rows:
        return ""
    columns = ["", "step", "default beside it", "times as fast as the default", "peak memory", "default's"]
    return _section(title, _table(columns, rows))


def _sizes(done: dict[str, Record]) -> str:
    rows = []
    for record in _of(done, "sizes"):
        jax, torch = record["results"]["sides"]
        rows.append([record["title"], f"{record['results']['batch']}", *_size_cells(jax), *_size_cells(torch),
                     _ratio(record["results"]["ratio"])])  # fmt: skip
    if not rows:
        return ""
    sides = [f"{name}, {what}" for name in ("JAX", "PyTorch") for what in ("tokens/s", "MFU", "memory")]
    return _section("Larger models", _table(["model", "batch", *sides, "JAX over PyTorch"], rows))


def _size_cells(side: dict[str, Any]) -> list[str]:
    mfu = "" if side["mfu"] is None else f"{side['mfu']:.1%}"
    return [f"{side['tokens_per_second']:,.0f}", mfu, f"{side['peak_bytes'] / 1e9:.1f} GB"]


def _generation(done: dict[str, Record]) -> str:
    rows = []
    for record in _of(done, "generate"):
        for side in record["results"]["sides"]:
            ratios = [_ratio(side[f"{what}_ratio"]) if side[f"{what}_ratio"] else "" for what in ("prefill", "decode")]
            share = "" if side["bandwidth_share"] is None else f"{side['bandwidth_share']:.0%}"
            prefill, decode = f"{side['prefill']:,.0f}", "" if side["decode"] is None else f"{side['decode']:,.1f}"
            rows.append([side["side"], f"{side['batch']}", prefill, ratios[0], decode, ratios[1], share])
    if not rows:
        return ""
    columns = ["side", "batch", "prefill, tokens/s", "over transformers", "decoding, tokens/s", "over transformers",
               "share of memory bandwidth"]  # fmt: skip
    return _section("Generation", _table(columns, rows))


def _parity(done: dict[str, Record]) -> str:
    if "parity" not in done:
        return ""
    found = done["parity"]["results"]
    verdict = "all passed" if found["passed"] else f"**{len(found['failed'])} failed**"
    rows = [[check["check"], check["case"], f"{check['measured']}", f"{check['limit']}", check["where"] or ""]
            for check in found["failed"]]  # fmt: skip
    table = _table(["check", "case", "measured", "limit", "where"], rows) if rows else ""
    return _section(
        "Parity", f"`parity/compare.py`: {found['cases']} cases, {verdict}, {found['seconds']:.0f} s.", table
    )


def _overfit(done: dict[str, Record]) -> str:
    if "overfit" not in done:
        return ""
    found = done["overfit"]["results"]
    losses = {int(step): loss for step, loss in found["losses"].items()}
    published = {int(step): loss for step, loss in found["published"].items()}
    last = list(losses.values())[-10:]
    reached = statistics.fmean(last) <= found["target"]
    said = (
        f"{found['bytes']:,} bytes of {found['text']}: {found['steps']} steps at {found['tokens_per_second']:,.0f} "
        f"tokens/s; the mean loss of the last {len(last)} steps is {statistics.fmean(last):.4f}, "
        f"{'at most' if reached else '**not yet**'} {found['target']}, {found['seconds']:.0f} s after the command."
    )
    steps = published or list(losses)[:: max(1, len(losses) // _POINTS)]
    rows = [[f"{step}", f"{losses[step]:.4f}", f"{published[step]:.4f}" if step in published else ""]
            for step in steps if step in losses]  # fmt: skip
    return _section("Overfitting", said, _table(["step", "loss", "published run"], rows))


def _not_done(records: list[Record]) -> str:
    rows = [[record["stage"], record["status"], f"{record['seconds']:.0f} s", record["message"]]
            for record in records if record["status"] != "done"]  # fmt: skip
    return _section("Not measured", _table(["stage", "", "after", "why"], rows)) if rows else ""


def _of(done: dict[str, Record], group: str) -> list[Record]:
    return [record for record in done.values() if record["group"] == group]


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.1f} ms"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
