"""Every numeric setting has a case in which it isn't the default, and in which ignoring it would show."""

import dataclasses
import functools
from typing import get_args, get_type_hints

import numpy as np
import pytest

from gpt2_core.config import ModelConfig, OptimizerConfig
from parity.gpt2 import limits
from parity.gpt2.adapters.protocol import Trained
from parity.gpt2.adapters.torch_adapter import TorchAdapter
from parity.gpt2.cases import random_weights
from parity.gpt2.checks.combinations import first_difference, uneven_batch
from parity.gpt2.checks.settings import CASES, STEPS, config_of, off_default
from parity.gpt2.faults import case_of

pytestmark = pytest.mark.usefixtures("x64")

# What ignoring these gives is another shape, which no comparison overlooks; dropout is a matter of masks.
SHAPES = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "mlp_width", "dropout"}


def numeric(config: type) -> set[str]:
    hints = get_type_hints(config)
    return {name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}}


@pytest.mark.parametrize("number, config", [(0, ModelConfig), (1, OptimizerConfig)])
def test_every_numeric_setting_has_a_case_at_another_value_than_its_default(number, config):
    assert numeric(config) == {name for case in CASES.values() for name in off_default(case[number])}


def ignorable() -> list[tuple[str, str]]:
    return [
        (case, name)
        for case, configs in CASES.items()
        for config in configs
        for name in off_default(config)
        if name not in SHAPES
    ]


tiny = functools.cache(case_of)


@functools.cache
def trained(model: ModelConfig, optimizer: OptimizerConfig) -> Trained:
    model = dataclasses.replace(model, dropout=0.0)
    batches = [uneven_batch(tiny(), model, step) for step in range(STEPS)]
    return TorchAdapter(random_weights(model, dtype=np.float64)).train(config_of(model, optimizer), batches)


@pytest.mark.parametrize("case, name", ignorable())
def test_a_program_that_ignored_the_setting_would_differ(case, name):
    ignoring = [
        dataclasses.replace(config, **{f.name: f.default for f in dataclasses.fields(config) if f.name == name})
        for config in CASES[case]
    ]
    assert first_difference(trained(*CASES[case]), trained(*ignoring), limits.STEP)[0] > 1e4 * limits.STEP
