import dataclasses

import pytest
from rich.console import Console

from gpt2_core.config import PRESETS, ModelConfig, TrainConfig
from gpt2_core.runs.summary import model_table, parameters_by_module, training_bytes

ROPE = ModelConfig(position="rope", mlp="swiglu", norm="rmsnorm", bias=False, tie_embeddings=False, qk_norm=True)


@pytest.mark.parametrize("model", [ModelConfig(**PRESETS["gpt2-xl"]), ROPE])
def test_the_modules_together_are_the_model(model):
    counts = parameters_by_module(TrainConfig(model=model))
    assert sum(counts.values()) == model.parameter_count
    assert ("wpe" in counts) == (model.position == "learned") and ("lm_head" in counts) != model.tie_embeddings


def test_gpt2s_table_says_what_is_known_of_it():
    console = Console(width=100, record=True)
    config = TrainConfig(batch_size=512)
    console.print(model_table(config))
    text = console.export_text()
    assert "124,439,808" in text and "38,597,376" in text  # all; 50257 x 768
    assert "c_attn 768x2304 + 2304" in text and "7,087,872" in text  # a block's own
    assert "1.99 GB: 498 MB of parameters, as much of gradients, 996 MB of moments" in " ".join(text.split())
    assert training_bytes(config) == 16 * 124_439_808
    assert "524,288 tokens" in text
    double = dataclasses.replace(config, precision="float64")
    assert training_bytes(double) == 2 * training_bytes(config)
