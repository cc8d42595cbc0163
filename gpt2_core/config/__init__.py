"""Every setting of a run as frozen dataclasses, with GPT-2's own defaults; `io` reads and writes them."""

from gpt2_core.config.checks import check_seed, divisors, one_of
from gpt2_core.config.model import IGNORE_INDEX, PRESETS, VOCABULARY_MULTIPLE, ModelConfig
from gpt2_core.config.train import (
    GROUPS,
    NEWEST,
    DataConfig,
    OptimizerConfig,
    Order,
    Precision,
    ResolvedConfig,
    TrainConfig,
    dtype_of,
    parse_mixture,
    resolved,
    with_accumulation,
)

__all__ = [
    "GROUPS",
    "IGNORE_INDEX",
    "NEWEST",
    "PRESETS",
    "VOCABULARY_MULTIPLE",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Order",
    "Precision",
    "ResolvedConfig",
    "TrainConfig",
    "check_seed",
    "divisors",
    "dtype_of",
    "one_of",
    "parse_mixture",
    "resolved",
    "with_accumulation",
]
