"""The table that a run prints first: parameters by module, memory, FLOPs."""

import math

from rich.table import Table

from gpt2_core.config import TrainConfig

_MODULES = {
    "wte": "token embeddings (wte)",
    "wpe": "position embeddings (wpe)",
    "attn": "attention",
    "mlp": "MLP",
    "norm": "norms",
    "lm_head": "head (lm_head)",
}


def parameters_by_module(config: TrainConfig) -> dict[str, int]:
    """Number of parameters of each kind of module, over all layers; their sum is `model.parameter_count`."""
    counts = dict.fromkeys(_MODULES, 0)
    for name, shape in config.model.parameter_shapes.items():
        parts = name.split(".")
        module = parts[0] if parts[0] != "h" else parts[2]
        counts["norm" if module.startswith("ln_") else module] += math.prod(shape)
    return {module: count for module, count in counts.items() if count}


def training_bytes(config: TrainConfig) -> int:
    """Bytes of parameters, their gradients and AdamW's two moments, over all devices; activations come on top."""
    return 4 * (8 if config.precision == "float64" else 4) * config.model.parameter_count


def model_table(config: TrainConfig) -> Table:
    """Parameters by module of a run's model, with its memory and FLOPs."""
    model = config.model
    sizes = f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, block {model.block_size}"
    table = Table(title=sizes, title_justify="left", show_footer=True)
    table.add_column("module", "all")
    table.add_column("parameters", f"{model.parameter_count:,}", justify="right")
    table.add_column("share", "100.0%", justify="right")
    for module, count in parameters_by_module(config).items():
        layers = f", {model.n_layer} x" if module in ("attn", "mlp") else ""
        table.add_row(_MODULES[module] + layers, f"{count:,}", f"{count / model.parameter_count:.1%}")
    if model.tie_embeddings:
        table.add_row("head (the token embeddings' weight)", "0", "")
    flops = config.training_flops_per_token
    table.caption = (
        f"{_in_units(training_bytes(config), 'B')} of parameters, gradients and moments; {_in_units(flops, 'FLOP')} a "
        f"token, {_in_units(flops * config.tokens_per_step, 'FLOP')} a step of {config.tokens_per_step:,} tokens"
    )
    table.caption_justify = "left"
    return table


def _in_units(number: float, unit: str) -> str:
    """With three digits and an SI prefix: 1.99 GB."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}{unit}"
