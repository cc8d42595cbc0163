"""The table that a run prints first: parameters by module, memory, FLOPs."""

import math
from collections import defaultdict

from rich.table import Table

from gpt2_core.config import TrainConfig

_MODULES = {
    "wte": "tokens (wte)",
    "wpe": "positions (wpe)",
    "attn": "attention",
    "mlp": "MLP",
    "norm": "norms",
    "ln_f": "norm (ln_f)",
    "lm_head": "head (lm_head)",
}
_IN_A_BLOCK = ("attn", "mlp", "norm")


def parameters_by_module(config: TrainConfig) -> dict[str, int]:
    """Number of parameters of each kind of module, over all layers; their sum is `model.parameter_count`."""
    counts = dict.fromkeys(_MODULES, 0)
    for name, shape in config.model.parameter_shapes.items():
        counts[_module(name)] += math.prod(shape)
    return {module: count for module, count in counts.items() if count}


def _module(name: str) -> str:
    parts = name.split(".")
    module = parts[2] if parts[0] == "h" else parts[0]
    return "norm" if module in ("ln_1", "ln_2") else module


def training_bytes(config: TrainConfig) -> int:
    """Bytes of parameters, their gradients and AdamW's two moments, over all devices; activations come on top."""
    return 4 * parameter_bytes(config)


def parameter_bytes(config: TrainConfig) -> int:
    """Bytes of the parameters, over all devices."""
    return (8 if config.precision == "float64" else 4) * config.model.parameter_count


def model_table(config: TrainConfig) -> Table:
    """Parameters of a run's model by module, with their shapes, and its memory and FLOPs."""
    model = config.model
    sizes = f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, block {model.block_size}"
    table = Table(title=sizes, title_justify="left", show_footer=True)
    table.add_column("module", "all, trainable")
    table.add_column("weights and biases")
    counts, shapes = parameters_by_module(config), _shapes(config)
    block = sum(counts[module] for module in _IN_A_BLOCK) // model.n_layer
    table.add_column("in a block", f"{block:,}", justify="right")
    table.add_column("parameters", f"{model.parameter_count:,}", justify="right")
    table.add_column("share", "100.0%", justify="right")
    for module, count in counts.items():
        in_a_block = f"{count // model.n_layer:,}" if module in _IN_A_BLOCK else ""
        share = f"{count / model.parameter_count:.1%}"
        table.add_row(_MODULES[module], "\n".join(shapes[module]), in_a_block, f"{count:,}", share)
    if model.tie_embeddings:
        table.add_row("head", "the tokens' weight", "", "0", "")
    flops, bytes_of_parameters = config.training_flops_per_token, parameter_bytes(config)
    table.caption = (
        f"{_in_units(training_bytes(config), 'B')}: {_in_units(bytes_of_parameters, 'B')} of parameters, as much of "
        f"gradients, {_in_units(2 * bytes_of_parameters, 'B')} of moments; {_in_units(flops, 'FLOP')} a token, "
        f"{_in_units(flops * config.tokens_per_step, 'FLOP')} a step of {config.tokens_per_step:,} tokens"
    )
    table.caption_justify = "left"
    return table


def _shapes(config: TrainConfig) -> dict[str, list[str]]:
    """Of each kind of module, the shapes in one block: `c_attn 768x2304 + 2304`."""
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, shape in config.model.parameter_shapes.items():
        if not name.startswith("h.") or name.startswith("h.0."):
            owner = name.rpartition(".")[0].removeprefix("h.0.")
            parts[_module(name), owner.rpartition(".")[2]].append("x".join(map(str, shape)))
    lines: dict[str, list[str]] = defaultdict(list)
    for (module, owner), shapes in parts.items():
        lines[module].append(" + ".join(shapes) if owner == module else f"{owner} {' + '.join(shapes)}")
    return lines


def _in_units(number: float, unit: str) -> str:
    """With three digits and an SI prefix: 1.99 GB."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}{unit}"
